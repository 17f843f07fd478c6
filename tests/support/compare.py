"""Equality to the bit, with a message that says where."""

from __future__ import annotations

import torch

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and bits, except that any NaN equals any other NaN."""
    assert result.dtype == expected.dtype, f"{result.dtype}, wanted {expected.dtype}"
    assert result.shape == expected.shape, f"{result.shape}, wanted {expected.shape}"
    word = _WORDS[expected.element_size()]
    differing = result.contiguous().view(word) != expected.contiguous().view(word)
    if expected.is_floating_point():
        differing &= ~(result.isnan() & expected.isnan())
    if differing.any():
        where = tuple(differing.nonzero()[0].tolist())
        found, wanted = (
            float(t[where]) if t.is_floating_point() else int(t[where]) for t in (result, expected)
        )
        raise AssertionError(
            f"{int(differing.sum())} of {differing.numel()} values differ; the first at {where}: "
            f"{found!r}, wanted {wanted!r}"
        )
