"""Launches of FP8 products that quantize their activations themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from mokernels.ops.configs import kind_of_fp8
from mokernels.ops.kernels.gemm_block import gemm_block
from mokernels.ops.kernels.gemm_quantizing import gemm_quantizing
from mokernels.ops.launch.product import (
    Ending,
    Operands,
    Planned,
    dense_columns,
    plan_product,
    row_stride,
)
from mokernels.ops.launch.quantize import rows_of
from mokernels.ops.quantizing import Activations, quantizes_in_gemm
from mokernels.ops.target import Target
from mokernels.ops.tuned import choose


@dataclass(frozen=True)
class Static:
    """One scale of all activations.

    Attributes:
        scale: fp32 [], what the codes are multiplied with.
        multiplier: fp32 [], what gives the codes.
    """

    scale: Tensor
    multiplier: Tensor


def plan_quantizing_gemm(
    x: Tensor,
    b: Tensor,
    static: Static | None,
    scale_b: Tensor,
    bias: Tensor | None,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned | None:
    """[..., N] of x's dtype from float x [..., K] and E4M3 b [N, K], x being quantized on the way.

    Args:
        x: bf16, fp16 or fp32.
        b: codes.
        static: the scale of x; None for one scale per token.
        scale_b: of b. Blocks make it None that is returned.
        bias: [N] or None.
        plan_n: rows of the fused group that b belongs to; 0 if it stands alone.
        target: the device's kind.

    Returns:
        The result and its launches, one or with split-K two. None where quantizing first is as
        good or better: scales of blocks, many rows, leading dimensions that one stride does not
        walk, and what :func:`quantizes_in_gemm` says.
    """
    how: Activations = "token" if static is None else "static"
    rows = rows_of(x)
    m, k, n = rows.total, rows.k, b.shape[0]
    if scale_b.dim() == 2 or rows.nested:
        return None
    config = choose(kind_of_fp8(target, False, False), m, n, k, target, plan_n, invariant)
    if not quantizes_in_gemm(how, m, k, x.element_size(), config, target):
        return None
    out = x.new_empty((*x.shape[:-1], n))
    w = dense_columns(b)
    if static is not None:
        factor, scale_x = static.multiplier.reshape(-1), static.scale
    elif config.split == "parts":
        factor = scale_x = x.new_empty(m, dtype=torch.float32)
    else:
        factor = scale_x = None
    operands = Operands((rows.tensor, w, factor), (rows.inner_stride, w.stride(0)), (m, n, k))
    return out, plan_product(
        gemm_quantizing,
        operands,
        Ending(out, bias, scale_x, scale_b),
        config,
        QUANTIZE=how,
        CASTS_ONCE=target.casts_fp8_once,
        PROMOTE=config.promote,
    )


def plan_block_quantizing_gemm(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned | None:
    """[..., N] of x's dtype from float x [..., K], quantized in 1x128 blocks, and E4M3 b [N, K].

    Args:
        x: bf16, fp16 or fp32.
        b: codes.
        scale_b: of b: [], [N] or of 128x128 blocks.
        bias: [N] or None.
        plan_n: rows of the fused group that b belongs to; 0 if it stands alone.
        target: the device's kind.

    Returns:
        As :func:`plan_quantizing_gemm`.
    """
    rows = rows_of(x)
    m, k, n = rows.total, rows.k, b.shape[0]
    config = choose(kind_of_fp8(target, True, False), m, n, k, target, plan_n, invariant)
    fits = quantizes_in_gemm("block", m, k, x.element_size(), config, target)
    if rows.nested or not fits:
        return None
    out, w = x.new_empty((*x.shape[:-1], n)), dense_columns(b)
    blocks = dense_columns(scale_b) if scale_b.dim() == 2 else None
    operands = Operands(
        (rows.tensor, w, None, blocks),
        (rows.inner_stride, w.stride(0), 0, row_stride(blocks)),
        (m, n, k),
    )
    return out, plan_product(
        gemm_block,
        operands,
        Ending(out, bias, None, scale_b if blocks is None else None),
        config,
        COMPUTE=tl.float8e4nv,
        QUANTIZE=True,
        CASTS_ONCE=target.casts_fp8_once,
    )
