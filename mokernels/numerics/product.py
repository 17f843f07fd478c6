"""The product of dequantized operands: what every GEMM computes, up to the order of addition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def scaled_product(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype = torch.float32,
    scale: Tensor | None = None,
) -> Tensor:
    """A @ b.T * scale + bias in fp32, rounded once to ``out_dtype``.

    Args:
        a: dequantized activations, fp32 [..., K].
        b: dequantized weight, fp32 [N, K].
        bias: [N] or None, any float dtype; added in fp32.
        out_dtype: of the result [..., N].
        scale: fp32 [] that multiplies the sums, or None for 1.
    """
    product = linear(a, b)
    if scale is not None:
        product = product * scale
    if bias is not None:
        product = product + bias.float()
    return product.to(out_dtype)
