"""The product of dequantized operands: what every GEMM computes, up to the order of addition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from mokernels.invariance import is_batch_invariant


def scaled_product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype = torch.float32,
    scale: Tensor | None = None,
) -> Tensor:
    """A @ b.T * scale + bias in fp32, rounded once to ``out_dtype``.

    Inside :func:`mokernels.batch_invariant` each row is multiplied by itself, which takes M passes
    over the weight.

    Args:
        a: dequantized activations, fp32 [..., K].
        b: dequantized weight, fp32 [N, K].
        bias: [N] or None, any float dtype; added in fp32.
        out_dtype: of the result [..., N].
        scale: fp32 [] that multiplies the sums, or None for 1.
    """
    product = _product_by_rows(a, b) if is_batch_invariant() else linear(a, b)
    if scale is not None:
        product = product * scale
    if bias is not None:
        product = product + bias.float()
    return product.to(out_dtype)


def _product_by_rows(a: Tensor, b: Tensor) -> Tensor:
    """A @ b.T, every row by the product that it takes alone."""
    rows = a.reshape(a.shape[:-1].numel(), a.shape[-1])
    product = a.new_empty((rows.shape[0], b.shape[0]))
    for row, result in zip(rows, product, strict=True):
        # A copy: the library's order of addition may follow the alignment of what it reads.
        result.copy_(linear(row.clone()[None], b)[0])
    return product.reshape(*a.shape[:-1], b.shape[0])
