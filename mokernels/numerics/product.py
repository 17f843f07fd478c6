"""The product of dequantized operands: what every GEMM computes, up to the order of addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from mokernels.formats import FP8_BLOCK
from mokernels.invariance import is_batch_invariant
from mokernels.numerics.elements import scratch

_PER_THREAD = 2**19  # weights decoded at a time: what a core's cache holds as fp32


class CodedWeight(NamedTuple):
    """A quantized weight of which some rows at a time become fp32.

    Attributes:
        shape: (N, K).
        decode: writes the rows of a slice to a contiguous fp32 [rows, K]; a slice begins at a
            multiple of 128, so that no block of scales is cut.
    """

    shape: tuple[int, int]
    decode: Callable[[slice, Tensor], object]


def scaled_product(
    a: Tensor,
    b: Tensor | CodedWeight,
    bias: Tensor | None,
    out_dtype: torch.dtype = torch.float32,
    scale: Tensor | None = None,
) -> Tensor:
    """A @ b.T * scale + bias in fp32, rounded once to ``out_dtype``.

    A coded weight is never whole in memory: its rows are decoded into the cache and multiplied from
    there, which takes a fraction of the time of writing and reading an fp32 weight. Inside
    :func:`mokernels.batch_invariant` each row of the activations is multiplied by itself.

    Args:
        a: dequantized activations, fp32 [..., K].
        b: dequantized weight, fp32 [N, K], or a quantized one.
        bias: [N] or None, any float dtype; added in fp32.
        out_dtype: of the result [..., N].
        scale: fp32 [] that multiplies the sums, or None for 1.
    """
    multiply = _product_by_rows if is_batch_invariant() else linear
    product = _coded_product(multiply, a, b) if isinstance(b, CodedWeight) else multiply(a, b)
    if scale is not None:
        product = product * scale
    if bias is not None:
        product = product + bias.float()
    return product.to(out_dtype)


def _coded_product(
    multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: CodedWeight
) -> Tensor:
    n, k = b.shape
    at_a_time = _PER_THREAD * max(2, torch.get_num_threads()) // max(k, 1)
    at_a_time = min(n, max(1, at_a_time // FP8_BLOCK) * FP8_BLOCK)
    product = a.new_empty((*a.shape[:-1], n))
    decoded = scratch("rows", torch.float32, at_a_time * k, a.device).view(at_a_time, k)
    for start in range(0, n, max(at_a_time, 1)):
        rows = slice(start, min(start + at_a_time, n))
        weight = decoded[: rows.stop - start]
        b.decode(rows, weight)
        product[..., rows] = multiply(a, weight)
    return product


def _product_by_rows(a: Tensor, b: Tensor) -> Tensor:
    """A @ b.T, every row by the product that it takes alone."""
    rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
    product = a.new_empty((rows.shape[0], b.shape[0]))
    for row, result in zip(rows, product, strict=True):
        # A copy: the library's order of addition may follow the alignment of what it reads.
        result.copy_(linear(row.clone()[None], b)[0])
    return product.reshape(*a.shape[:-1], b.shape[0])
