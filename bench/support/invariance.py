"""Cases: what it costs that a row does not depend on its batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mokernels
from bench.support.contest import Case, Contender, Contest, Peer, Setting
from bench.support.gemms import KINDS, SHAPES, linear_contest

ROWS = (1, 16, 128, 2048)
WITHOUT = "without the mode"


def invariant_cases() -> Iterator[Case]:
    """Quantize and multiply under batch_invariant(): every kind, two shapes."""
    for kind_name, kind in KINDS.items():
        for shape in ("gate_up", "down"):
            n, k = SHAPES[shape]
            for m in ROWS:
                yield Case(
                    name=f"batch-invariant {kind_name} {n}x{k} M={m}",
                    group="batch invariance",
                    tier=5 if m in (16, 2048) else 7,
                    build=partial(_contest, kind_name, m, n, k),
                    facts={"format": kind.format, "projection": shape, "m": m, "n": n, "k": k},
                )


def _contest(kind_name: str, m: int, n: int, k: int, setting: Setting) -> Contest:
    """The same operator in the mode and out of it; in the mode the first row has its own bits."""
    plain = linear_contest(kind_name, m, n, k, setting)
    alone = linear_contest(kind_name, m, n, k, setting, rows=1)

    def in_mode(call: Any) -> Tensor:
        with mokernels.batch_invariant():
            return call()  # type: ignore[no-any-return]

    def check(result: Tensor) -> float:
        row = in_mode(alone.ours.calls[0])
        return plain.check(result) if torch.equal(row, result[:1]) else float("inf")

    calls = [partial(in_mode, call) for call in plain.ours.calls]
    ours = Contender(f"batch-invariant {kind_name}", calls, plain.ours.work)
    return Contest(
        ours,
        [Peer(WITHOUT, lambda: Contender(WITHOUT, plain.ours.calls, plain.ours.work))],
        check,
        plain.check,
    )
