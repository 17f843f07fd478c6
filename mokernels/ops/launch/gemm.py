"""Launchers of the GEMM operators.

Each ``plan_*`` allocates its outputs and workspaces and returns the result with the launches that
fill it; it runs no kernel and reads no device, so that it works on meta tensors. Where a split K
needs counters (:mod:`counters`) they are those of the current stream, for the launches to go to.

Operands keep their row strides; an operand whose last dimension is not contiguous is copied first,
as are activations whose leading dimensions cannot be seen as one.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

from mokernels.invariance import is_batch_invariant
from mokernels.ops.checks import dtype_or, out_dtype_of
from mokernels.ops.configs import Kind, choose_without_tma, kind_of_fp8
from mokernels.ops.kernels.gemm_block import gemm_block
from mokernels.ops.kernels.gemm_epilogue import gemm_epilogue
from mokernels.ops.kernels.gemm_native import gemm_native
from mokernels.ops.launch.decode import TRITON_DTYPES, plan_mxfp8_decode, plan_nvfp4_decode
from mokernels.ops.launch.gemv import plan_e4m3_gemv, takes_e4m3_gemv
from mokernels.ops.launch.persistent import plan_persistent, tma_reads
from mokernels.ops.launch.plan import Launch, run
from mokernels.ops.launch.product import (
    Ending,
    Operands,
    Planned,
    codes_of,
    dense_columns,
    plan_product,
    row_stride,
    rows_of,
)
from mokernels.ops.launch.quantize import plan_dequantize_mxfp8, plan_dequantize_nvfp4
from mokernels.ops.target import Target, target_of
from mokernels.ops.tuned import choose


def fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: str = "bfloat16",
    fast_accum: bool = False,
    plan_n: int = 0,
    *,
    target: Target | None = None,
) -> Tensor:
    """FP8 by FP8; see ``mokernels::fp8_gemm``."""
    dtype, target = out_dtype_of("fp8_gemm", out_dtype), target or target_of(a.device)
    return run(
        plan_fp8_gemm(
            a,
            b,
            scale_a,
            scale_b,
            bias,
            dtype,
            fast_accum,
            plan_n,
            target=target,
            invariant=is_batch_invariant(),
        )
    )


def nvfp4_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    global_scale_a: Tensor,
    global_scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: str = "bfloat16",
    plan_n: int = 0,
    *,
    target: Target | None = None,
) -> Tensor:
    """NVFP4 by NVFP4; see ``mokernels::nvfp4_gemm``."""
    dtype, target = out_dtype_of("nvfp4_gemm", out_dtype), target or target_of(a.device)
    globals_ = (global_scale_a, global_scale_b)
    return run(
        plan_nvfp4_gemm(
            a,
            b,
            scale_a,
            scale_b,
            *globals_,
            bias,
            dtype,
            plan_n,
            target=target,
            invariant=is_batch_invariant(),
        )
    )


def mxfp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: str = "bfloat16",
    plan_n: int = 0,
    *,
    target: Target | None = None,
) -> Tensor:
    """MXFP8 by MXFP8; see ``mokernels::mxfp8_gemm``."""
    dtype, target = out_dtype_of("mxfp8_gemm", out_dtype), target or target_of(a.device)
    return run(
        plan_mxfp8_gemm(
            a,
            b,
            scale_a,
            scale_b,
            bias,
            dtype,
            plan_n,
            target=target,
            invariant=is_batch_invariant(),
        )
    )


def fp8_weight_only_gemm(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    *,
    target: Target | None = None,
) -> Tensor:
    """Float by FP8; see ``mokernels::fp8_weight_only_gemm``."""
    target = target or target_of(x.device)
    return run(
        plan_fp8_weight_only(
            x, b, scale_b, bias, plan_n, target=target, invariant=is_batch_invariant()
        )
    )


def nvfp4_weight_only_gemm(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    global_scale_b: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    global_scale_a: Tensor | None = None,
    out_dtype: str | None = None,
    *,
    target: Target | None = None,
) -> Tensor:
    """Float by NVFP4; see ``mokernels::nvfp4_weight_only_gemm``."""
    target = target or target_of(x.device)
    tail = (bias, dtype_or("nvfp4_weight_only_gemm", out_dtype, x.dtype), plan_n)
    scales = (scale_b, global_scale_a, global_scale_b)
    return run(
        plan_nvfp4_decode(x, b, *scales, *tail, target=target, invariant=is_batch_invariant())
    )


def mxfp8_weight_only_gemm(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    out_dtype: str | None = None,
    *,
    target: Target | None = None,
) -> Tensor:
    """Float by MXFP8; see ``mokernels::mxfp8_weight_only_gemm``."""
    dtype = dtype_or("mxfp8_weight_only_gemm", out_dtype, x.dtype)
    target = target or target_of(x.device)
    return run(
        plan_mxfp8_decode(
            x, b, scale_b, bias, dtype, plan_n, target=target, invariant=is_batch_invariant()
        )
    )


def plan_fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool = False,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """[..., N] of ``dtype`` from E4M3 [..., K] and [N, K], with scales of any granularity."""
    # Scales of 1x128 blocks have as many dimensions as the codes; fewer mean one for each row.
    a_blocks = scale_a.dim() == a.dim() and tuple(scale_a.shape) != (1,)
    kind = kind_of_fp8(target, a_blocks or scale_b.dim() == 2, fast_accum)
    compute = _fp8_operands(target)
    out = a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)
    x = codes_of(rows_of(a), target)
    block_scale = rows_of(scale_a) if a_blocks else None
    ending = Ending(out, bias, None if a_blocks else scale_a)
    launches = _plan_fp8(
        x, b, block_scale, scale_b, ending, kind, compute, plan_n, target, invariant
    )
    return out, launches


def plan_fp8_weight_only(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """[..., N] of x's dtype from float [..., K] and E4M3 [N, K].

    One row of 16 bits by a large weight is multiplied without matrix units (:mod:`gemv`).
    """
    kind = Kind.HALF_BLOCK if scale_b.dim() == 2 else Kind.HALF_FP8
    if x.dtype == torch.float32:
        kind = Kind.FP32
    out = x.new_empty((*x.shape[:-1], b.shape[0]))
    compute, rows, codes = TRITON_DTYPES[x.dtype], rows_of(x), dense_columns(b)
    # A GEMV adds in an order of its own, which no other number of rows has.
    if not invariant and takes_e4m3_gemv(rows.shape[0], x.dtype, codes, plan_n):
        blocks = dense_columns(scale_b) if scale_b.dim() == 2 else None
        ending = Ending(out, bias, None, scale_b if blocks is None else None)
        return out, plan_e4m3_gemv(x, codes, blocks, ending, compute, plan_n, target)
    ending = Ending(out, bias)
    return out, _plan_fp8(
        rows, codes, None, scale_b, ending, kind, compute, plan_n, target, invariant
    )


def plan_nvfp4_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    global_scale_a: Tensor,
    global_scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """[..., N] of ``dtype`` from NVFP4 [..., K / 2] and [N, K / 2].

    Where the matrix units do not apply block scales, the activations are first decoded to bf16
    without their global scale, which is exact.
    """
    if not target.has_nvfp4_dot:
        x, decode = plan_dequantize_nvfp4(a, scale_a, None, "bfloat16", target=target)
        out, launches = plan_nvfp4_decode(
            x,
            b,
            scale_b,
            global_scale_a,
            global_scale_b,
            bias,
            dtype,
            plan_n,
            target=target,
            invariant=invariant,
        )
        return out, (*decode, *launches)
    out = a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)
    ending = Ending(out, bias, global_scale_a, global_scale_b)
    return out, _plan_native(Kind.NVFP4, a, b, scale_a, scale_b, ending, plan_n, target, invariant)


def plan_mxfp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """[..., N] of ``dtype`` from MXFP8 [..., K] and [N, K].

    Where the matrix units do not apply block scales, the activations are first decoded to bf16,
    which is exact inside bf16's range.
    """
    if not target.has_mxfp8_dot:
        x, decode = plan_dequantize_mxfp8(a, scale_a, "bfloat16", target=target)
        out, launches = plan_mxfp8_decode(
            x, b, scale_b, bias, dtype, plan_n, target=target, invariant=invariant
        )
        return out, (*decode, *launches)
    out = a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype)
    ending = Ending(out, bias)
    return out, _plan_native(Kind.MXFP8, a, b, scale_a, scale_b, ending, plan_n, target, invariant)


def _fp8_operands(target: Target) -> Any:
    """Triton's name of the dtype in which E4M3 is multiplied by E4M3."""
    if target.has_fnuz_dot:
        return tl.float8e4b8
    return tl.float8e4nv if target.has_fp8_dot else tl.float16


def _plan_fp8(
    x: Tensor,
    b: Tensor,
    block_scale_x: Tensor | None,
    scale_b: Tensor,
    ending: Ending,
    kind: Kind,
    compute: Any,
    plan_n: int,
    target: Target,
    invariant: bool,
) -> tuple[Launch, ...]:
    """Codes or floats x [M, K] by an FP8 weight, its scale of any granularity."""
    w = codes_of(dense_columns(b), target)
    (m, k), n = x.shape, w.shape[0]
    config = choose(kind, m, n, k, target, plan_n, invariant)
    if config.tma and not (tma_reads(x, target) and tma_reads(w, target)):
        config = choose_without_tma(kind, m, n, k, target, plan_n, invariant)
    block_scale_w = dense_columns(scale_b) if scale_b.dim() == 2 else None
    if block_scale_w is None:
        ending = Ending(ending.out, ending.bias, ending.scale_x, scale_b)
    if block_scale_x is None and block_scale_w is None and not config.tma:
        operands = Operands((x, w), (x.stride(0), w.stride(0)), (m, n, k))
        return plan_product(
            gemm_epilogue, operands, ending, config, COMPUTE=compute, PROMOTE=config.promote
        )
    operands = Operands(
        (x, w, block_scale_x, block_scale_w),
        (x.stride(0), w.stride(0), row_stride(block_scale_x), row_stride(block_scale_w)),
        (m, n, k),
    )
    if config.tma:
        return plan_persistent(operands, ending, config, target)
    constants = {"COMPUTE": compute, "QUANTIZE": False, "CASTS_ONCE": target.casts_fp8_once}
    return plan_product(gemm_block, operands, ending, config, **constants)


def _plan_native(
    kind: Kind,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    ending: Ending,
    plan_n: int,
    target: Target,
    invariant: bool,
) -> tuple[Launch, ...]:
    """NVFP4 by NVFP4, or MXFP8 by MXFP8, on units that apply the block scales."""
    x, w = rows_of(a), dense_columns(b)
    scale_x, scale_w = rows_of(scale_a), dense_columns(scale_b)
    k = x.shape[1] * (2 if kind is Kind.NVFP4 else 1)
    sizes = (x.shape[0], w.shape[0], k)
    pointers = (x, w, scale_x, scale_w)
    strides = tuple(pointer.stride(0) for pointer in pointers)
    config = choose(kind, *sizes, target, plan_n, invariant)
    if config.tma and not (tma_reads(x, target) and tma_reads(w, target)):
        config = choose_without_tma(kind, *sizes, target, plan_n, invariant)
    element: Literal["e2m1", "e4m3"] = "e2m1" if kind is Kind.NVFP4 else "e4m3"
    operands = Operands(pointers, strides, sizes)
    if config.tma:
        return plan_persistent(operands, ending, config, target, element)
    constants = {"ELEMENT": element, "IN_ORDER": target.copies_scales}
    return plan_product(gemm_native, operands, ending, config, **constants)
