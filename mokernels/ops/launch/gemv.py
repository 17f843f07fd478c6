"""Launches of products of one row of floats by a weight, without a matrix instruction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mokernels.ops.configs import Kind
from mokernels.ops.kernels.gemv import gemv_nvfp4
from mokernels.ops.kernels.gemv_e4m3 import gemv_e4m3
from mokernels.ops.launch.plan import Launch
from mokernels.ops.launch.product import Ending, Operands, plan_product, row_stride, rows_of
from mokernels.ops.quantizing import multiplies_row_by_e4m3_gemv, multiplies_row_by_gemv
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
    return _starts_aligned(codes) and multiplies_row_by_gemv(rows, plan_n or n, k, quantized)


def takes_e4m3_gemv(rows: int, dtype: torch.dtype, codes: Tensor, plan_n: int) -> bool:
    """Whether :func:`plan_e4m3_gemv` multiplies ``rows`` rows by a weight of E4M3 codes.

    Args:
        rows: of the activations.
        dtype: of the activations that the product reads.
        codes: E4M3 or bytes [N, K], the last dimension dense.
        plan_n: rows of the fused group that the weight belongs to; 0 if it stands alone.
    """
    n, k = codes.shape
    large = multiplies_row_by_e4m3_gemv(rows, plan_n or n, k)
    return large and dtype != torch.float32 and _starts_aligned(codes)


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
    words, sizes = codes.view(torch.int32), (1, codes.shape[0], x.shape[-1])
    config = choose(Kind.GEMV_NVFP4, *sizes, target, plan_n)
    pairs = _pairs(scale)
    strides = (codes.stride(0) // ALIGNMENT, pairs.stride(0))
    return plan_product(
        gemv_nvfp4,
        Operands((_row(x), words, pairs), strides, sizes),
        ending,
        config,
        DTYPE=dtype,
        HAS_TYPE=target.has_fp8_type,
        PTX=target.backend == "cuda",
    )


def plan_e4m3_gemv(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor | None,
    ending: Ending,
    dtype: Any,
    plan_n: int,
    target: Target,
) -> tuple[Launch, ...]:
    """One row of 16-bit floats [..., K], Triton's name of their dtype being ``dtype``, by E4M3.

    Args:
        x: bf16 or fp16.
        codes: [N, K], with dense rows.
        block_scale: fp32 [ceil(N / 128), ceil(K / 128)], exponents uint8 [N, K / 32], or None.
        ending: what to do with the sums, and where to put them.
        dtype: as said.
        plan_n: rows of the fused group that the weight belongs to; 0 if it stands alone.
        target: the device.
    """
    words, sizes = codes.view(torch.int32), (1, codes.shape[0], x.shape[-1])
    config = choose(_kind_of_scale(block_scale), *sizes, target, plan_n)
    return plan_product(
        gemv_e4m3,
        Operands(
            (_row(x), words, block_scale),
            (codes.stride(0) // ALIGNMENT, row_stride(block_scale)),
            sizes,
        ),
        ending,
        config,
        DTYPE=dtype,
        CONVERTS=target.backend == "cuda" and target.has_fp8_type,
    )


def _kind_of_scale(block_scale: Tensor | None) -> Kind:
    if block_scale is None:
        return Kind.GEMV_FP8
    return Kind.GEMV_MXFP8 if block_scale.dtype == torch.uint8 else Kind.GEMV_BLOCK


def _starts_aligned(codes: Tensor) -> bool:
    """Whether rows of bytes start at multiples of 16 of them."""
    return bool((codes.stride(0) | codes.data_ptr()) % ALIGNMENT == 0)


def _pairs(scale: Tensor) -> Tensor:
    """Block scales [N, K / 16] as int16 [N, K / 32]; of a copy where rows start at odd bytes."""
    scale = scale.view(torch.uint8)
    if (scale.stride(0) | scale.data_ptr()) % 2:
        # By way of one dimension: a row alone may keep whatever stride it has.
        scale = scale.reshape(-1).clone().view(scale.shape)
    return scale.view(torch.int16)


def _row(x: Tensor) -> Tensor:
    """The one row of x, or a copy if it starts between two multiples of 16 bytes.

    As fp32 [K], or int32 words of two 16-bit numbers each.
    """
    row = rows_of(x).reshape(-1)
    row = row if row.data_ptr() % ALIGNMENT == 0 else row.clone()
    return row if row.dtype == torch.float32 else row.view(torch.int32)
