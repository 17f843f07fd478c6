"""Launchers of the linear operators: quantize the activations, multiply.

Where a format's codes go to the matrix units as they are, the activations are quantized to codes
and scales: a few rows of FP8 by the GEMM itself, so that there is one launch, everything else by a
launch before it, to the same bits. Where they are decoded again, the GEMM does both for one row,
unless a GEMV multiplies that (a large weight), and otherwise the quantizer writes the decoded
values at once: the same numbers (exact in bf16, without the global scale of NVFP4), and one pass
less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mokernels.invariance import is_batch_invariant
from mokernels.ops.launch.decode import (
    plan_mxfp8_decode,
    plan_mxfp8_row,
    plan_nvfp4_decode,
    plan_nvfp4_row,
)
from mokernels.ops.launch.gemm import plan_fp8_gemm, plan_mxfp8_gemm, plan_nvfp4_gemm
from mokernels.ops.launch.plan import Launch, run
from mokernels.ops.launch.product import Planned
from mokernels.ops.launch.quantize import (
    plan_fake_quantize_mxfp8,
    plan_fake_quantize_nvfp4,
    plan_quantize_fp8,
    plan_quantize_fp8_per_block,
    plan_quantize_fp8_per_token,
    plan_quantize_mxfp8,
    plan_quantize_nvfp4,
    plan_static_scales,
)
from mokernels.ops.launch.quantizing import (
    Static,
    plan_block_quantizing_gemm,
    plan_quantizing_gemm,
)
from mokernels.ops.target import Target, target_of


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None = None,
    input_multiplier: Tensor | None = None,
    plan_n: int = 0,
    *,
    target: Target | None = None,
) -> Tensor:
    """See ``mokernels::fp8_linear``."""
    target = target or target_of(x.device)
    scales = (weight_scale, input_scale, bias, input_multiplier)
    return run(
        plan_fp8_linear(x, weight, *scales, plan_n, target=target, invariant=is_batch_invariant())
    )


def fp8_per_token_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    *,
    target: Target | None = None,
) -> Tensor:
    """See ``mokernels::fp8_per_token_linear``."""
    target = target or target_of(x.device)
    return run(
        plan_fp8_per_token_linear(
            x, weight, weight_scale, bias, plan_n, target=target, invariant=is_batch_invariant()
        )
    )


def fp8_block_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    *,
    target: Target | None = None,
) -> Tensor:
    """See ``mokernels::fp8_block_linear``."""
    target = target or target_of(x.device)
    return run(
        plan_fp8_block_linear(
            x, weight, weight_scale, bias, plan_n, target=target, invariant=is_batch_invariant()
        )
    )


def nvfp4_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    input_scale: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    *,
    target: Target | None = None,
) -> Tensor:
    """See ``mokernels::nvfp4_linear``."""
    target = target or target_of(x.device)
    scales = (weight_scale, weight_scale_2, input_scale)
    return run(
        plan_nvfp4_linear(
            x, weight, *scales, bias, plan_n, target=target, invariant=is_batch_invariant()
        )
    )


def mxfp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
    *,
    target: Target | None = None,
) -> Tensor:
    """See ``mokernels::mxfp8_linear``."""
    target = target or target_of(x.device)
    return run(
        plan_mxfp8_linear(
            x, weight, weight_scale, bias, plan_n, target=target, invariant=is_batch_invariant()
        )
    )


def plan_fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    input_multiplier: Tensor | None,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """One calibrated scale: ``input_scale`` as stored, or 1 / m together with the multiplier m."""
    before: tuple[Launch, ...] = ()
    if input_multiplier is None:
        (input_multiplier, input_scale), before = plan_static_scales(input_scale)
    static = Static(input_scale, input_multiplier)
    planned = plan_quantizing_gemm(
        x, weight, static, weight_scale, bias, plan_n, target=target, invariant=invariant
    )
    if planned is not None:
        return planned[0], (*before, *planned[1])
    codes, quantize = plan_quantize_fp8(x, input_scale, input_multiplier, target=target)
    scales = (input_scale, weight_scale)
    out, multiply = plan_fp8_gemm(
        codes, weight, *scales, bias, x.dtype, plan_n=plan_n, target=target, invariant=invariant
    )
    return out, (*before, *quantize, *multiply)


def plan_fp8_per_token_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """One scale for each token."""
    planned = plan_quantizing_gemm(
        x, weight, None, weight_scale, bias, plan_n, target=target, invariant=invariant
    )
    if planned is not None:
        return planned
    (codes, scale), quantize = plan_quantize_fp8_per_token(x, target=target)
    out, multiply = plan_fp8_gemm(
        codes,
        weight,
        scale,
        weight_scale,
        bias,
        x.dtype,
        plan_n=plan_n,
        target=target,
        invariant=invariant,
    )
    return out, (*quantize, *multiply)


def plan_fp8_block_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """One scale for each 1x128 block."""
    planned = plan_block_quantizing_gemm(
        x, weight, weight_scale, bias, plan_n, target=target, invariant=invariant
    )
    if planned is not None:
        return planned
    (codes, scale), quantize = plan_quantize_fp8_per_block(x, target=target)
    out, multiply = plan_fp8_gemm(
        codes,
        weight,
        scale,
        weight_scale,
        bias,
        x.dtype,
        plan_n=plan_n,
        target=target,
        invariant=invariant,
    )
    return out, (*quantize, *multiply)


def plan_nvfp4_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    input_scale: Tensor,
    bias: Tensor | None,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """NVFP4 activations and weight; both global scales multiply the finished sum."""
    tail = (input_scale, weight_scale_2, bias, x.dtype, plan_n)
    planned = plan_nvfp4_row(x, weight, weight_scale, *tail, target=target, invariant=invariant)
    if planned is not None:
        return planned
    if target.has_nvfp4_dot:
        (codes, scale), quantize = plan_quantize_nvfp4(x, input_scale, target=target)
        out, multiply = plan_nvfp4_gemm(
            codes, weight, scale, weight_scale, *tail, target=target, invariant=invariant
        )
    else:
        values, quantize = plan_fake_quantize_nvfp4(x, input_scale, torch.bfloat16, target=target)
        out, multiply = plan_nvfp4_decode(
            values, weight, weight_scale, *tail, target=target, invariant=invariant
        )
    return out, (*quantize, *multiply)


def plan_mxfp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    plan_n: int = 0,
    *,
    target: Target,
    invariant: bool = False,
) -> Planned:
    """MXFP8 activations and weight."""
    tail = (bias, x.dtype, plan_n)
    planned = plan_mxfp8_row(x, weight, weight_scale, *tail, target=target, invariant=invariant)
    if planned is not None:
        return planned
    if target.has_mxfp8_dot:
        (codes, scale), quantize = plan_quantize_mxfp8(x, target=target)
        out, multiply = plan_mxfp8_gemm(
            codes, weight, scale, weight_scale, *tail, target=target, invariant=invariant
        )
    else:
        values, quantize = plan_fake_quantize_mxfp8(x, torch.bfloat16, target=target)
        out, multiply = plan_mxfp8_decode(
            values, weight, weight_scale, *tail, target=target, invariant=invariant
        )
    return out, (*quantize, *multiply)
