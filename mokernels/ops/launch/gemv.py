"""Launches of products of one row of floats by an NVFP4 weight, without a matrix instruction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mokernels.ops.configs import Kind
from mokernels.ops.kernels.gemv import gemv_nvfp4
from mokernels.ops.launch.plan import Launch
from mokernels.ops.launch.product import Ending, Operands, plan_product, rows_of
from mokernels.ops.quantizing import multiplies_row_by_gemv
from mokernels.ops.target import Target
from mokernels.ops.tuned import choose

ALIGNMENT = 16
"""Bytes of a load; where x and the weight's rows start at multiples of it, loads are that wide."""


def takes_gemv(rows: int, codes: Tensor, plan_n: int, quantized: bool) -> bool:
    """Whether :func:`plan_gemv` multiplies ``rows`` rows by a weight of NVFP4.

    Rows that do not start at multiples of 16 bytes go to the matrix units instead, which add in
    another order: members of a group are all aligned if the group is.

    Args:
        rows: of the activations.
        codes: bytes [N, K / 2], the last dimension dense.
        plan_n: rows of the fused group that the weight belongs to; 0 if it stands alone.
        quantized: whether the activations are.
    """
    n, k = codes.shape[0], 2 * codes.shape[1]
    aligned = codes.stride(0) % ALIGNMENT == 0 and codes.data_ptr() % ALIGNMENT == 0
    return aligned and multiplies_row_by_gemv(rows, plan_n or n, k, quantized)


def plan_gemv(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    ending: Ending,
    dtype: Any,
    plan_n: int,
    target: Target,
) -> tuple[Launch, ...]:
    """One row of floats [..., K], Triton's name of their dtype being ``dtype``, by NVFP4.

    ``codes`` and ``scale`` are as a DecodedWeight has them.
    """
    row, words = _aligned(rows_of(x).reshape(-1)), codes.view(torch.int32)
    if x.dtype != torch.float32:
        row = row.view(torch.int32)
    sizes = (1, codes.shape[0], x.shape[-1])
    config = choose(Kind.GEMV_NVFP4, *sizes, target, plan_n)
    pairs = _pairs(scale)
    strides = (codes.stride(0) // ALIGNMENT, pairs.stride(0))
    return plan_product(
        gemv_nvfp4,
        Operands((row, words, pairs), strides, sizes),
        ending,
        config,
        DTYPE=dtype,
        HAS_TYPE=target.has_fp8_type,
        PTX=target.backend == "cuda",
    )


def _pairs(scale: Tensor) -> Tensor:
    """Block scales [N, K / 16] as int16 [N, K / 32]; of a copy where rows start at odd bytes."""
    scale = scale.view(torch.uint8)
    if (scale.stride(0) | scale.data_ptr()) % 2:
        # By way of one dimension: a row alone may keep whatever stride it has.
        scale = scale.reshape(-1).clone().view(scale.shape)
    return scale.view(torch.int16)


def _aligned(x: Tensor) -> Tensor:
    """The row, or a copy of one that starts between two multiples of 16 bytes."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()
