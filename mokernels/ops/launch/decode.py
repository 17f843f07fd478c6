"""Launches of products whose weight is decoded: NVFP4 and MXFP8 by floats.

It is decoded in the product's registers, or, where many rows make up for that, by a launch before
(:mod:`decoded`). The activations are floats: as they are, already quantized and decoded again, or
one row that the product quantizes itself. One row by an NVFP4 weight, or by a large MXFP8 weight,
has a kernel of its own (:mod:`gemv`).
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
import triton.language as tl
from torch import Tensor

from mokernels.ops.configs import GemmConfig, Kind, choose_without_tma
from mokernels.ops.kernels.gemm_decode import gemm_decode
from mokernels.ops.launch.decoded import plan_decoded
from mokernels.ops.launch.gemv import plan_e4m3_gemv, plan_gemv, takes_e4m3_gemv, takes_gemv
from mokernels.ops.launch.plan import Launch
from mokernels.ops.launch.product import (
    Ending,
    Operands,
    Planned,
    codes_of,
    dense_columns,
    plan_product,
    rows_of,
)
from mokernels.ops.quantizing import quantizes_row_in_gemm
from mokernels.ops.target import Target
from mokernels.ops.tuned import choose

TRITON_DTYPES = MappingProxyType(
    {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
)


@dataclass(frozen=True)
class DecodedWeight:
    """A weight that a product decodes.

    Attributes:
        format: which codes and scales these are.
        codes: bytes [N, K / 2] of NVFP4; E4M3 [N, K] of MXFP8, as bytes where the type lacks.
        scale: E4M3 [N, K / 16] of NVFP4, likewise; exponents [N, K / 32] of MXFP8.
    """

    format: Literal["nvfp4", "mxfp8"]
    codes: Tensor
    scale: Tensor

    @classmethod
    def nvfp4(cls, codes: Tensor, scale: Tensor, target: Target) -> DecodedWeight:
        """Of a checkpoint's tensors, as the kernels for ``target`` read them."""
        return cls("nvfp4", dense_columns(codes), codes_of(dense_columns(scale), target))

    @classmethod
    def mxfp8(cls, codes: Tensor, scale: Tensor, target: Target) -> DecodedWeight:
        """Of a checkpoint's tensors, as the kernels for ``target`` read them."""
        return cls("mxfp8", codes_of(dense_columns(codes), target), dense_columns(scale))


def plan_nvfp4_decode(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    global_scale_a: Tensor | None,
    global_scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """[..., N] of ``dtype`` from float x [..., K], times global_scale_a if given, and NVFP4 b.

    With global_scale_a x are the values of quantized activations, and one row of them is multiplied
    by the kernel that multiplies it where the row is quantized by the product (plan_nvfp4_row).
    """
    kind = Kind.FP32 if x.dtype == torch.float32 else Kind.HALF_NVFP4
    out = x.new_empty((*x.shape[:-1], b.shape[0]), dtype=dtype)
    ending = Ending(out, bias, global_scale_a, global_scale_b)
    weight = DecodedWeight.nvfp4(b, scale_b, target)
    rows, quantized = x.shape[:-1].numel(), global_scale_a is not None
    compute = TRITON_DTYPES[x.dtype]
    # A GEMV adds in an order of its own, which no other number of rows has.
    if not invariant and takes_gemv(rows, weight.codes, plan_n, quantized):
        return out, plan_gemv(x, weight.codes, weight.scale, ending, compute, plan_n, target)
    return out, _plan(x, weight, ending, kind, compute, plan_n, target, invariant)


def plan_mxfp8_decode(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """[..., N] of ``dtype`` from float x [..., K] and MXFP8 b.

    fp16 has too few exponents for the decoded weight, so that fp16 activations meet it in fp32; but
    not one row that is multiplied without matrix units, quantized before or not (see
    quantizing.multiplies_row_by_e4m3_gemv).
    """
    kind, compute = Kind.FP32, tl.float32
    if x.dtype == torch.bfloat16:
        kind, compute = Kind.HALF_MXFP8, tl.bfloat16
    out = x.new_empty((*x.shape[:-1], b.shape[0]), dtype=dtype)
    weight, ending = DecodedWeight.mxfp8(b, scale_b, target), Ending(out, bias)
    rows = x.shape[:-1].numel()
    if not invariant and takes_e4m3_gemv(rows, x.dtype, weight.codes, plan_n):
        gemv = (weight.codes, weight.scale, ending, TRITON_DTYPES[x.dtype], plan_n, target)
        return out, plan_e4m3_gemv(x, *gemv)
    return out, _plan(x, weight, ending, kind, compute, plan_n, target, invariant)


def plan_nvfp4_row(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    input_scale: Tensor,
    global_scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned | None:
    """As quantizing x to NVFP4, decoding it to bf16 and :func:`plan_nvfp4_decode`, in one launch.

    None where :func:`quantizes_row_in_gemm` says that it takes two, or :func:`takes_gemv` that two
    are faster. ``input_scale`` is fp32 with one item, the global scale of x.
    """
    rows = x.shape[:-1].numel()
    if input_scale.numel() != 1 or not quantizes_row_in_gemm(rows, target.has_nvfp4_dot):
        return None
    weight = DecodedWeight.nvfp4(b, scale_b, target)
    if not invariant and takes_gemv(rows, weight.codes, plan_n, True):
        return None
    out = x.new_empty((*x.shape[:-1], b.shape[0]), dtype=dtype)
    ending = Ending(out, bias, input_scale, global_scale_b)
    return out, _plan_row(
        x, weight, input_scale, ending, Kind.HALF_NVFP4, plan_n, target, invariant
    )


def plan_mxfp8_row(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned | None:
    """As quantizing x to MXFP8, decoding it to bf16 and :func:`plan_mxfp8_decode`, in one launch.

    None where :func:`quantizes_row_in_gemm` says that it takes two, or :func:`takes_e4m3_gemv` that
    two are faster: the quantizer writes bf16, whatever x is.
    """
    rows = x.shape[:-1].numel()
    if not quantizes_row_in_gemm(rows, target.has_mxfp8_dot):
        return None
    weight = DecodedWeight.mxfp8(b, scale_b, target)
    if not invariant and takes_e4m3_gemv(rows, torch.bfloat16, weight.codes, plan_n):
        return None
    out = x.new_empty((*x.shape[:-1], b.shape[0]), dtype=dtype)
    return out, _plan_row(
        x, weight, None, Ending(out, bias), Kind.HALF_MXFP8, plan_n, target, invariant
    )


def _plan_row(
    x: Tensor,
    weight: DecodedWeight,
    global_scale_x: Tensor | None,
    ending: Ending,
    kind: Kind,
    plan_n: int,
    target: Target,
    invariant: bool,
) -> tuple[Launch, ...]:
    """A row that is quantized on the way; multiplied in bf16, in which its values are exact."""
    return _plan(
        x, weight, ending, kind, tl.bfloat16, plan_n, target, invariant, True, global_scale_x
    )


def _plan(
    x: Tensor,
    weight: DecodedWeight,
    ending: Ending,
    kind: Kind,
    compute: Any,
    plan_n: int,
    target: Target,
    invariant: bool,
    quantize: bool = False,
    global_scale_x: Tensor | None = None,
) -> tuple[Launch, ...]:
    x, w, scale = rows_of(x), weight.codes, weight.scale
    (m, k), n = x.shape, w.shape[0]
    config = choose(kind, m, n, k, target, plan_n, invariant)
    if config.tma:
        planned = plan_decoded(x, weight.format, w, scale, ending, config, target)
        if planned is not None:
            return planned
        config = choose_without_tma(kind, m, n, k, target, plan_n, invariant)
    strides = (x.stride(0), w.stride(0), scale.stride(0))
    format: str = weight.format
    if kind is Kind.HALF_NVFP4 and target.backend == "cuda":
        format, w = f"nvfp4x{_run(config, target)}", _words(w)
        strides = (x.stride(0), 4 * w.stride(0), scale.stride(0))
    return plan_product(
        gemm_decode,
        Operands((x, w, scale, global_scale_x), strides, (m, n, k)),
        ending,
        config,
        FORMAT=format,
        COMPUTE=compute,
        QUANTIZE=quantize,
        CASTS_ONCE=target.casts_fp8_once,
    )


def _run(config: GemmConfig, target: Target) -> int:
    """Neighbours in K that a thread holds of the weight: see RUN in kernels/words.py.

    It goes with the matrix instruction, which is one for a kind and target, but for few rows on
    Hopper: wgmma and tcgen05 have at least 64 rows on their M side.
    """
    m_side = config.block_n if config.swap else config.block_m
    return 2 if target.wants_swapped_operands and m_side >= 64 else 8


def _words(codes: Tensor) -> Tensor:
    """Bytes [N, K / 2] as int32 [N, K / 8]; of a copy where rows start between two words."""
    if codes.numel() == 0:
        return codes.new_empty((codes.shape[0], codes.shape[1] // 4), dtype=torch.int32)
    if (codes.stride(0) | codes.data_ptr()) % 4:
        # By way of one dimension: a row alone may keep whatever stride it has.
        codes = codes.reshape(-1).clone().view(codes.shape)
    return codes.view(torch.int32)
