"""How long calls take on a device, without what launching them costs the host."""

from __future__ import annotations

from collections.abc import Callable

import triton.testing

REPEAT_MS = 20
"""Milliseconds of calls in one captured graph, of whose replays the median counts."""


def graph_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call, captured many times in a CUDA graph that is replayed."""
    milliseconds = triton.testing.do_bench_cudagraph(call, rep=REPEAT_MS, return_mode="median")
    return float(milliseconds) / 1000
