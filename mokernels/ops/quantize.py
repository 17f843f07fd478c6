"""Quantize and dequantize operators: ``torch.ops.mokernels.quantize_*`` and ``dequantize_*``.

Every ``quantize_*`` takes activations x [..., K] in bf16, fp16 or fp32, of any strides, and returns
contiguous codes (and scales). Every ``dequantize_*`` takes them back to ``out_dtype``.

==========================  =======================  ===============================  =============
operator                    codes                    scale                            K multiple of
==========================  =======================  ===============================  =============
quantize_fp8                float8_e4m3fn [..., K]   given, fp32 []                   1
quantize_fp8_per_token      float8_e4m3fn [..., K]   fp32 [...]                       1
quantize_fp8_per_block      float8_e4m3fn [..., K]   fp32 [..., ceil(K / 128)]        1
quantize_nvfp4              uint8 [..., K / 2]       float8_e4m3fn [..., K / 16]      16
quantize_mxfp8              float8_e4m3fn [..., K]   uint8 [..., K / 32] (E8M0)       32
==========================  =======================  ===============================  =============

``quantize_fp8`` takes ``scale`` as a checkpoint stores it (``input_scale``) and multiplies x by
m = 448 / (448 * scale); a caller that keeps m may pass it as ``multiplier`` and save the division.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mokernels.numerics as numerics
from mokernels.errors import ArgumentError
from mokernels.formats import FP8_BLOCK, MXFP8_BLOCK, NVFP4_BLOCK
from mokernels.ops.checks import (
    check_dtype,
    check_float,
    check_multiple,
    check_scalar,
    check_shape,
    describe,
    out_dtype_of,
)
from mokernels.ops.registry import register

FP8 = torch.float8_e4m3fn


def _check_quantize_fp8(x: Tensor, scale: Tensor, multiplier: Tensor | None = None) -> None:
    check_float("quantize_fp8", "x", x)
    check_scalar("quantize_fp8", "scale", scale)
    if multiplier is not None:
        check_scalar("quantize_fp8", "multiplier", multiplier)


def _quantize_fp8(x: Tensor, scale: Tensor, multiplier: Tensor | None = None) -> Tensor:
    if multiplier is None:
        multiplier, _ = numerics.static_fp8_scales(scale)
    return numerics.quantize_fp8(x, multiplier).contiguous()


def _fake_quantize_fp8(x: Tensor, scale: Tensor, multiplier: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=FP8)


def _check_quantize_fp8_per_token(x: Tensor) -> None:
    check_float("quantize_fp8_per_token", "x", x)


def _quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = numerics.quantize_fp8_per_token(x)
    return codes.contiguous(), scale.contiguous()


def _fake_quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _check_quantize_fp8_per_block(x: Tensor) -> None:
    check_float("quantize_fp8_per_block", "x", x)


def _quantize_fp8_per_block(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = numerics.quantize_fp8_per_block(x)
    return codes.contiguous(), scale.contiguous()


def _fake_quantize_fp8_per_block(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = (*x.shape[:-1], (x.shape[-1] + FP8_BLOCK - 1) // FP8_BLOCK)
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(blocks, dtype=torch.float32)


def _check_quantize_nvfp4(x: Tensor, global_scale: Tensor) -> None:
    check_float("quantize_nvfp4", "x", x)
    check_multiple("quantize_nvfp4", "x", x, NVFP4_BLOCK)
    check_scalar("quantize_nvfp4", "global_scale", global_scale)


def _quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = numerics.quantize_nvfp4(x, global_scale.reshape(()))
    return codes.contiguous(), scale.contiguous()


def _fake_quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    lead, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty((*lead, k // 2), dtype=torch.uint8)
    return codes, x.new_empty((*lead, k // NVFP4_BLOCK), dtype=FP8)


def _check_quantize_mxfp8(x: Tensor) -> None:
    check_float("quantize_mxfp8", "x", x)
    check_multiple("quantize_mxfp8", "x", x, MXFP8_BLOCK)


def _quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, exponents = numerics.quantize_mxfp8(x)
    return codes.contiguous(), exponents.contiguous()


def _fake_quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    exponents = x.new_empty((*x.shape[:-1], x.shape[-1] // MXFP8_BLOCK), dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=FP8), exponents


def _check_dequantize_fp8(codes: Tensor, scale: Tensor, out_dtype: str = "bfloat16") -> None:
    op = "dequantize_fp8"
    out_dtype_of(op, out_dtype)
    check_dtype(op, "codes", codes, FP8)
    check_dtype(op, "scale", scale, torch.float32)
    lead, columns = tuple(codes.shape[:-1]), -(-codes.shape[-1] // FP8_BLOCK)
    legal = [(), (1,), lead, (*lead, columns)]
    if codes.dim() == 2:
        legal.append((-(-codes.shape[0] // FP8_BLOCK), columns))
    if codes.dim() == 0 or tuple(scale.shape) not in legal:
        raise ArgumentError(
            f"mokernels::{op}: codes are {describe(codes)} and the scale is {describe(scale)}, "
            f"wanted a scale of one of the shapes {', '.join(str(list(s)) for s in legal)}."
        )


def _dequantize_fp8(codes: Tensor, scale: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    dtype = out_dtype_of("dequantize_fp8", out_dtype)
    return numerics.dequantize_fp8(codes, scale, dtype).contiguous()


def _fake_dequantize_fp8(codes: Tensor, scale: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    return codes.new_empty(codes.shape, dtype=out_dtype_of("dequantize_fp8", out_dtype))


def _check_dequantize_nvfp4(
    codes: Tensor, scale: Tensor, global_scale: Tensor, out_dtype: str = "bfloat16"
) -> None:
    op = "dequantize_nvfp4"
    out_dtype_of(op, out_dtype)
    check_dtype(op, "codes", codes, torch.uint8)
    check_multiple(op, "codes", codes, NVFP4_BLOCK, per_item=2)
    blocks = (*codes.shape[:-1], codes.shape[-1] * 2 // NVFP4_BLOCK)
    check_shape(op, "scale", scale, FP8, blocks)
    check_scalar(op, "global_scale", global_scale)


def _dequantize_nvfp4(
    codes: Tensor, scale: Tensor, global_scale: Tensor, out_dtype: str = "bfloat16"
) -> Tensor:
    dtype = out_dtype_of("dequantize_nvfp4", out_dtype)
    return numerics.dequantize_nvfp4(codes, scale, global_scale.reshape(()), dtype).contiguous()


def _fake_dequantize_nvfp4(
    codes: Tensor, scale: Tensor, global_scale: Tensor, out_dtype: str = "bfloat16"
) -> Tensor:
    dtype = out_dtype_of("dequantize_nvfp4", out_dtype)
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 2), dtype=dtype)


def _check_dequantize_mxfp8(codes: Tensor, scale: Tensor, out_dtype: str = "bfloat16") -> None:
    op = "dequantize_mxfp8"
    out_dtype_of(op, out_dtype)
    check_dtype(op, "codes", codes, FP8)
    check_multiple(op, "codes", codes, MXFP8_BLOCK)
    blocks = (*codes.shape[:-1], codes.shape[-1] // MXFP8_BLOCK)
    check_shape(op, "scale", scale, torch.uint8, blocks)


def _dequantize_mxfp8(codes: Tensor, scale: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    dtype = out_dtype_of("dequantize_mxfp8", out_dtype)
    return numerics.dequantize_mxfp8(codes, scale, dtype).contiguous()


def _fake_dequantize_mxfp8(codes: Tensor, scale: Tensor, out_dtype: str = "bfloat16") -> Tensor:
    return codes.new_empty(codes.shape, dtype=out_dtype_of("dequantize_mxfp8", out_dtype))


register(
    "quantize_fp8(Tensor x, Tensor scale, Tensor? multiplier=None) -> Tensor",
    check=_check_quantize_fp8,
    reference=_quantize_fp8,
    fake=_fake_quantize_fp8,
)
register(
    "quantize_fp8_per_token(Tensor x) -> (Tensor, Tensor)",
    check=_check_quantize_fp8_per_token,
    reference=_quantize_fp8_per_token,
    fake=_fake_quantize_fp8_per_token,
)
register(
    "quantize_fp8_per_block(Tensor x) -> (Tensor, Tensor)",
    check=_check_quantize_fp8_per_block,
    reference=_quantize_fp8_per_block,
    fake=_fake_quantize_fp8_per_block,
)
register(
    "quantize_nvfp4(Tensor x, Tensor global_scale) -> (Tensor, Tensor)",
    check=_check_quantize_nvfp4,
    reference=_quantize_nvfp4,
    fake=_fake_quantize_nvfp4,
)
register(
    "quantize_mxfp8(Tensor x) -> (Tensor, Tensor)",
    check=_check_quantize_mxfp8,
    reference=_quantize_mxfp8,
    fake=_fake_quantize_mxfp8,
)
# One arithmetic, one implementation: the three names match the three quantizers.
for _name in ("dequantize_fp8", "dequantize_fp8_per_token", "dequantize_fp8_per_block"):
    register(
        f'{_name}(Tensor codes, Tensor scale, str out_dtype="bfloat16") -> Tensor',
        check=_check_dequantize_fp8,
        reference=_dequantize_fp8,
        fake=_fake_dequantize_fp8,
    )
register(
    "dequantize_nvfp4(Tensor codes, Tensor scale, Tensor global_scale, "
    'str out_dtype="bfloat16") -> Tensor',
    check=_check_dequantize_nvfp4,
    reference=_dequantize_nvfp4,
    fake=_fake_dequantize_nvfp4,
)
register(
    'dequantize_mxfp8(Tensor codes, Tensor scale, str out_dtype="bfloat16") -> Tensor',
    check=_check_dequantize_mxfp8,
    reference=_dequantize_mxfp8,
    fake=_fake_dequantize_mxfp8,
)
