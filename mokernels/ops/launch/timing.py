"""How long calls take on a device, without what launching them costs the host."""

from __future__ import annotations

from collections.abc import Callable

import triton.testing

REPEAT_MS = 2
"""Milliseconds of calls in one captured graph, of whose ten replays the median counts: a few
hundred calls, since capturing more takes longer than replaying them, and a captured call may own
memory."""


def graph_seconds(call: Callable[[], object]) -> float:
    """Seconds of one call, captured many times in a CUDA graph that is replayed."""
    milliseconds = triton.testing.do_bench_cudagraph(call, rep=REPEAT_MS, return_mode="median")
    return float(milliseconds) / 1000
