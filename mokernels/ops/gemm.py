"""GEMM operators: activations [..., K] by quantized weights [N, K] to [..., N].

Weights have the layout of the checkpoint (K contiguous). Products are accumulated in fp32; scales,
bias and the cast to the output's dtype happen in the same launch. ``plan_n`` is the N that the
launch is planned for (0: the weight's own): members of a fused group pass the group's, so that a
member run alone adds in the same order as the group.

======================  ============================================================================
operator                operands
======================  ============================================================================
fp8_gemm                e4m3 [..., K] x e4m3 [N, K]; scale_a [] | [...] | [..., ceil(K/128)];
                        scale_b [] | [N] | [ceil(N/128), ceil(K/128)], all fp32
nvfp4_gemm              uint8 [..., K/2] x uint8 [N, K/2]; block scales e4m3 [..., K/16];
                        global_scale_a fp32 [], global_scale_b fp32 [] | [N]
mxfp8_gemm              e4m3 [..., K] x e4m3 [N, K]; exponents uint8 [..., K/32]
fp8_weight_only_gemm    float [..., K] x e4m3 [N, K]; scale_b as for fp8_gemm
nvfp4_weight_only_gemm  float [..., K] x uint8 [N, K/2]
mxfp8_weight_only_gemm  float [..., K] x e4m3 [N, K]
======================  ============================================================================

Where ``out_dtype`` may be None, which it is by default, that means the dtype of the activations.
``global_scale_a`` of nvfp4_weight_only_gemm multiplies the sums: its x may be what
quantize_nvfp4_to_bf16 returned. A global scale [N] belongs to weights that were made one, of which
every member brings its own.
``fast_accum`` lets the tensor cores of Hopper keep their own reduced-precision accumulator for the
whole of K instead of promoting it to fp32 every 128 products; elsewhere it changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mokernels.numerics as numerics
from mokernels.formats import MXFP8_BLOCK, NVFP4_BLOCK
from mokernels.ops.checks import (
    check_activation_scale,
    check_bias,
    check_dtype,
    check_float,
    check_fp8_weight,
    check_mxfp8_weight,
    check_nvfp4_weight,
    check_scalar,
    check_shape,
    dtype_or,
    out_dtype_of,
)
from mokernels.ops.registry import register

FP8 = torch.float8_e4m3fn


def _check_fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: str = "bfloat16",
    fast_accum: bool = False,
    plan_n: int = 0,
) -> None:
    out_dtype_of("fp8_gemm", out_dtype)
    check_dtype("fp8_gemm", "a", a, FP8)
    check_fp8_weight("fp8_gemm", a, b, scale_b)
    check_activation_scale("fp8_gemm", scale_a, a)
    check_bias("fp8_gemm", bias, b.shape[0])


def _fp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: str = "bfloat16",
    fast_accum: bool = False,
    plan_n: int = 0,
) -> Tensor:
    x, weight = numerics.dequantize_fp8(a, scale_a), numerics.fp8_weight(b, scale_b)
    return numerics.scaled_product(x, weight, bias, out_dtype_of("fp8_gemm", out_dtype))


def _check_nvfp4_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    global_scale_a: Tensor,
    global_scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: str = "bfloat16",
    plan_n: int = 0,
) -> None:
    op = "nvfp4_gemm"
    out_dtype_of(op, out_dtype)
    check_dtype(op, "a", a, torch.uint8)
    check_nvfp4_weight(op, a, a.shape[-1] * 2, b, scale_b, global_scale_b)
    blocks = (*a.shape[:-1], a.shape[-1] * 2 // NVFP4_BLOCK)
    check_shape(op, "scale_a", scale_a, FP8, blocks)
    check_scalar(op, "global_scale_a", global_scale_a)
    check_bias(op, bias, b.shape[0])


def _nvfp4_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    global_scale_a: Tensor,
    global_scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: str = "bfloat16",
    plan_n: int = 0,
) -> Tensor:
    x = numerics.dequantize_nvfp4(a, scale_a, global_scale_a.reshape(()))
    weight = numerics.nvfp4_weight(b, scale_b, global_scale_b)
    return numerics.scaled_product(x, weight, bias, out_dtype_of("nvfp4_gemm", out_dtype))


def _check_mxfp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: str = "bfloat16",
    plan_n: int = 0,
) -> None:
    op = "mxfp8_gemm"
    out_dtype_of(op, out_dtype)
    check_dtype(op, "a", a, FP8)
    check_mxfp8_weight(op, a, b, scale_b)
    blocks = (*a.shape[:-1], a.shape[-1] // MXFP8_BLOCK)
    check_shape(op, "scale_a", scale_a, torch.uint8, blocks)
    check_bias(op, bias, b.shape[0])


def _mxfp8_gemm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    out_dtype: str = "bfloat16",
    plan_n: int = 0,
) -> Tensor:
    x, weight = numerics.dequantize_mxfp8(a, scale_a), numerics.mxfp8_weight(b, scale_b)
    return numerics.scaled_product(x, weight, bias, out_dtype_of("mxfp8_gemm", out_dtype))


def _check_fp8_weight_only(
    x: Tensor, b: Tensor, scale_b: Tensor, bias: Tensor | None = None, plan_n: int = 0
) -> None:
    check_float("fp8_weight_only_gemm", "x", x)
    check_fp8_weight("fp8_weight_only_gemm", x, b, scale_b)
    check_bias("fp8_weight_only_gemm", bias, b.shape[0])


def _fp8_weight_only_gemm(
    x: Tensor, b: Tensor, scale_b: Tensor, bias: Tensor | None = None, plan_n: int = 0
) -> Tensor:
    weight = numerics.fp8_weight(b, scale_b)
    return numerics.scaled_product(x.float(), weight, bias, x.dtype)


def _check_nvfp4_weight_only(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    global_scale_b: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    global_scale_a: Tensor | None = None,
    out_dtype: str | None = None,
) -> None:
    op = "nvfp4_weight_only_gemm"
    check_float(op, "x", x)
    dtype_or(op, out_dtype, x.dtype)
    check_nvfp4_weight(op, x, x.shape[-1], b, scale_b, global_scale_b)
    check_bias(op, bias, b.shape[0])
    if global_scale_a is not None:
        check_scalar(op, "global_scale_a", global_scale_a)


def _nvfp4_weight_only_gemm(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    global_scale_b: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    global_scale_a: Tensor | None = None,
    out_dtype: str | None = None,
) -> Tensor:
    dtype = dtype_or("nvfp4_weight_only_gemm", out_dtype, x.dtype)
    weight = numerics.nvfp4_weight(b, scale_b, global_scale_b)
    return numerics.scaled_product(x.float(), weight, bias, dtype, global_scale_a)


def _check_mxfp8_weight_only(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    out_dtype: str | None = None,
) -> None:
    check_float("mxfp8_weight_only_gemm", "x", x)
    dtype_or("mxfp8_weight_only_gemm", out_dtype, x.dtype)
    check_mxfp8_weight("mxfp8_weight_only_gemm", x, b, scale_b)
    check_bias("mxfp8_weight_only_gemm", bias, b.shape[0])


def _mxfp8_weight_only_gemm(
    x: Tensor,
    b: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    out_dtype: str | None = None,
) -> Tensor:
    dtype = dtype_or("mxfp8_weight_only_gemm", out_dtype, x.dtype)
    return numerics.scaled_product(x.float(), numerics.mxfp8_weight(b, scale_b), bias, dtype)


def fake_product(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[..., N] in the dtype of x: every linear operator, and fp8_weight_only_gemm."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_gemm(out_dtype_position: int, default: str | None = "bfloat16") -> Any:
    def fake(a: Tensor, b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = args[out_dtype_position - 2 : out_dtype_position - 1]
        name = given[0] if given else kwargs.get("out_dtype", default)
        return a.new_empty((*a.shape[:-1], b.shape[0]), dtype=dtype_or("gemm", name, a.dtype))

    return fake


_TAIL = 'Tensor? bias=None, str out_dtype="bfloat16", '
register(
    f"fp8_gemm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, {_TAIL}"
    "bool fast_accum=False, int plan_n=0) -> Tensor",
    check=_check_fp8_gemm,
    reference=_fp8_gemm,
    fake=_fake_gemm(out_dtype_position=5),
)
register(
    "nvfp4_gemm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, Tensor global_scale_a, "
    f"Tensor global_scale_b, {_TAIL}int plan_n=0) -> Tensor",
    check=_check_nvfp4_gemm,
    reference=_nvfp4_gemm,
    fake=_fake_gemm(out_dtype_position=7),
)
register(
    f"mxfp8_gemm(Tensor a, Tensor b, Tensor scale_a, Tensor scale_b, {_TAIL}int plan_n=0)"
    " -> Tensor",
    check=_check_mxfp8_gemm,
    reference=_mxfp8_gemm,
    fake=_fake_gemm(out_dtype_position=5),
)
register(
    "fp8_weight_only_gemm(Tensor x, Tensor b, Tensor scale_b, Tensor? bias=None, int plan_n=0)"
    " -> Tensor",
    check=_check_fp8_weight_only,
    reference=_fp8_weight_only_gemm,
    fake=fake_product,
)
register(
    "nvfp4_weight_only_gemm(Tensor x, Tensor b, Tensor scale_b, Tensor global_scale_b, "
    "Tensor? bias=None, int plan_n=0, Tensor? global_scale_a=None, str? out_dtype=None) -> Tensor",
    check=_check_nvfp4_weight_only,
    reference=_nvfp4_weight_only_gemm,
    fake=_fake_gemm(out_dtype_position=7, default=None),
)
register(
    "mxfp8_weight_only_gemm(Tensor x, Tensor b, Tensor scale_b, Tensor? bias=None, int plan_n=0, "
    "str? out_dtype=None) -> Tensor",
    check=_check_mxfp8_weight_only,
    reference=_mxfp8_weight_only_gemm,
    fake=_fake_gemm(out_dtype_position=5, default=None),
)
