"""Launchers of the fake quantization operators: a launch that quantizes, one that dequantizes.

Weights are quantized by :mod:`mokernels.numerics` on their device, as the export does, which takes
several passes over them; that happens once a step, activations are what has to be fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mokernels import numerics
from mokernels.ops.fake_quantize import quantized_fp8_weight
from mokernels.ops.launch.quantize import (
    dequantize_fp8,
    dequantize_mxfp8,
    dequantize_nvfp4,
    quantize_fp8,
    quantize_fp8_per_token,
    quantize_mxfp8,
    quantize_nvfp4,
)
from mokernels.ops.target import Target


def fake_quantize_fp8(x: Tensor, scale: Tensor, *, target: Target | None = None) -> Tensor:
    """E4M3 with one calibrated scale fp32 [], [..., K] in x's dtype."""
    multiplier, divisor = numerics.static_fp8_scales(scale.reshape(()))
    codes = quantize_fp8(x, scale, multiplier, target=target)
    return dequantize_fp8(codes, divisor, _name(x), target=target)


def fake_quantize_fp8_per_token(x: Tensor, *, target: Target | None = None) -> Tensor:
    """E4M3 with a scale for each token, [..., K] in x's dtype."""
    codes, scale = quantize_fp8_per_token(x, target=target)
    return dequantize_fp8(codes, scale, _name(x), target=target)


def fake_quantize_nvfp4(x: Tensor, global_scale: Tensor, *, target: Target | None = None) -> Tensor:
    """E2M1 in blocks of 16 with a given global scale fp32 [], [..., K] in x's dtype."""
    codes, scale = quantize_nvfp4(x, global_scale, target=target)
    return dequantize_nvfp4(codes, scale, global_scale, _name(x), target=target)


def fake_quantize_mxfp8(x: Tensor, *, target: Target | None = None) -> Tensor:
    """E4M3 in blocks of 32, [..., K] in x's dtype."""
    codes, exponents = quantize_mxfp8(x, target=target)
    return dequantize_mxfp8(codes, exponents, _name(x), target=target)


def fake_quantize_fp8_weight(
    weight: Tensor,
    granularity: str = "tensor",
    amax: Tensor | None = None,
    *,
    target: Target | None = None,
) -> Tensor:
    """E4M3 weight [N, K] with a scale for the tensor, each row or each 128x128 block."""
    if not weight.numel():
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    codes, scale = quantized_fp8_weight(weight, granularity, amax)
    return dequantize_fp8(codes, scale, _name(weight), target=target)


def fake_quantize_nvfp4_weight(
    weight: Tensor, global_scale: Tensor | None = None, *, target: Target | None = None
) -> Tensor:
    """E2M1 weight [N, K] in blocks of 16 with a global scale, its own by default."""
    if not weight.numel():
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    shared = None if global_scale is None else global_scale.reshape(())
    codes, scale, second = numerics.quantize_nvfp4_weight(weight, shared)
    return dequantize_nvfp4(codes, scale, second, _name(weight), target=target)


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
