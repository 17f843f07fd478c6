"""What has to hold before a speed is worth anything.

A check takes a result and returns its error as a share of what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench.support.contest import Check

_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_CHUNK = 2048  # rows of a weight that are multiplied in fp64 at a time


def product_check(x: Tensor, weight: Tensor, *, fp8_units: bool) -> Check:
    """Any order of adding the exact products in fp32, then one rounding.

    K fp32 additions miss the sum by at most K 2 ** -24 of the sum of magnitudes; scales and the
    bias round a few times more. FP8 matrix units of Hopper keep 13 fraction bits of the largest
    addend over at most 128 products, of which they add 32 at a time: 4 roundings of 2 ** -13.

    Args:
        x: activations as they are after quantization, fp32 [M, K], from mokernels.numerics.
        weight: dequantized, fp32 [N, K].
        fp8_units: whether FP8 matrix units may have added the products.
    """
    unit = (x.shape[-1] + 16) * 2.0**-24 + (4 * 2.0**-13 if fp8_units else 0.0)

    def check(y: Tensor) -> float:
        worst = 0.0
        y = y.reshape(-1, weight.shape[0])
        for start in range(0, weight.shape[0], _CHUNK):
            rows = weight[start : start + _CHUNK].double()
            exact = x.double() @ rows.T
            allowed = (x.double().abs() @ rows.abs().T) * unit + 2.0**-25
            allowed += exact.abs() * _ROUNDOFF[y.dtype]
            off = (y[:, start : start + _CHUNK].double() - exact).abs() / allowed
            worst = max(worst, float(off.nan_to_num(nan=torch.inf).max()))
        return worst

    return check


def close_check(expected: Any, bound: float) -> Check:
    """Distance from ``expected``, relative to its length, at most ``bound``; tensors or lists."""
    wanted = _listed(expected)

    def check(result: Any) -> float:
        found = _listed(result)
        if len(found) != len(wanted):
            return float("inf")
        return max(relative_error(f, w) for f, w in zip(found, wanted, strict=True)) / bound

    return check


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| (Euclidean); infinite for another shape or a NaN."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.double(), expected.to(found.device).double()
    length = float(expected.norm())
    error = float((found - expected).norm()) / max(length, 1e-30)
    return error if error == error else float("inf")


def _listed(value: Any) -> Sequence[Tensor]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
