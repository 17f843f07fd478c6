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
quantize_nvfp4_to_bf16      values, bf16 [..., K]    in the values, but the global    16
quantize_mxfp8_to_bf16      values, bf16 [..., K]    in the values                    32
==========================  =======================  ===============================  =============

``quantize_fp8`` takes ``scale`` as a checkpoint stores it (``input_scale``) and multiplies x by
m = 448 / (448 * scale); a caller that keeps m may pass it as ``multiplier`` and save the division.

The ``*_to_bf16`` quantizers return code * block scale, for GEMMs whose matrix units apply no block
scales: exact in bf16 (MXFP8: within its normal range), with NVFP4's global scale left to the
accumulator.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

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
from mokernels.ops.registry import Function, register, schema_of

FP8 = torch.float8_e4m3fn


class Quantizer(NamedTuple):
    """A way to quantize activations: what ``quantize_<name>`` and the fused operators share.

    Attributes:
        extra: schema of the arguments after the activations.
        returns: schema of each result.
        check: takes the operator's name, the activations' name, the activations and the rest.
        reference: takes the activations and the rest, on the CPU.
        fake: the same, for shapes and dtypes only; its results are contiguous.
    """

    extra: tuple[str, ...]
    returns: tuple[str, ...]
    check: Function
    reference: Function
    fake: Function


def _check_static(
    op: str, name: str, x: Tensor, scale: Tensor, multiplier: Tensor | None = None
) -> None:
    check_float(op, name, x)
    check_scalar(op, "scale", scale)
    if multiplier is not None:
        check_scalar(op, "multiplier", multiplier)


def _check_nvfp4(op: str, name: str, x: Tensor, global_scale: Tensor) -> None:
    check_float(op, name, x)
    check_multiple(op, name, x, NVFP4_BLOCK)
    check_scalar(op, "global_scale", global_scale)


def _check_mxfp8(op: str, name: str, x: Tensor) -> None:
    check_float(op, name, x)
    check_multiple(op, name, x, MXFP8_BLOCK)


def _quantize_fp8(x: Tensor, scale: Tensor, multiplier: Tensor | None = None) -> Tensor:
    if multiplier is None:
        multiplier, _ = numerics.static_fp8_scales(scale)
    return numerics.quantize_fp8(x, multiplier).contiguous()


def _fake_quantize_fp8(x: Tensor, scale: Tensor, multiplier: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=FP8)


def _quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = numerics.quantize_fp8_per_token(x)
    return codes.contiguous(), scale.contiguous()


def _fake_quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _quantize_fp8_per_block(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = numerics.quantize_fp8_per_block(x)
    return codes.contiguous(), scale.contiguous()


def _fake_quantize_fp8_per_block(x: Tensor) -> tuple[Tensor, Tensor]:
    blocks = (*x.shape[:-1], (x.shape[-1] + FP8_BLOCK - 1) // FP8_BLOCK)
    return x.new_empty(x.shape, dtype=FP8), x.new_empty(blocks, dtype=torch.float32)


def _quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    codes, scale = numerics.quantize_nvfp4(x, global_scale.reshape(()))
    return codes.contiguous(), scale.contiguous()


def _fake_quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    lead, k = x.shape[:-1], x.shape[-1]
    codes = x.new_empty((*lead, k // 2), dtype=torch.uint8)
    return codes, x.new_empty((*lead, k // NVFP4_BLOCK), dtype=FP8)


def _quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, exponents = numerics.quantize_mxfp8(x)
    return codes.contiguous(), exponents.contiguous()


def _fake_quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    exponents = x.new_empty((*x.shape[:-1], x.shape[-1] // MXFP8_BLOCK), dtype=torch.uint8)
    return x.new_empty(x.shape, dtype=FP8), exponents


def _quantize_nvfp4_to_bf16(x: Tensor, global_scale: Tensor) -> Tensor:
    codes, scale = numerics.quantize_nvfp4(x, global_scale.reshape(()))
    one = torch.ones((), device=x.device)
    return numerics.dequantize_nvfp4(codes, scale, one, torch.bfloat16).contiguous()


def _quantize_mxfp8_to_bf16(x: Tensor) -> Tensor:
    return numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x), torch.bfloat16).contiguous()


def _fake_quantize_to_bf16(x: Tensor, *extra: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.bfloat16)


_STATIC, _GLOBAL = ("Tensor scale", "Tensor? multiplier=None"), ("Tensor global_scale",)
_ONE, _TWO = ("Tensor",), ("Tensor", "Tensor")
# The functions by their place: check, reference, fake.
QUANTIZERS = {
    "fp8": Quantizer(_STATIC, _ONE, _check_static, _quantize_fp8, _fake_quantize_fp8),
    "fp8_per_token": Quantizer(
        (), _TWO, check_float, _quantize_fp8_per_token, _fake_quantize_fp8_per_token
    ),
    "fp8_per_block": Quantizer(
        (), _TWO, check_float, _quantize_fp8_per_block, _fake_quantize_fp8_per_block
    ),
    "nvfp4": Quantizer(_GLOBAL, _TWO, _check_nvfp4, _quantize_nvfp4, _fake_quantize_nvfp4),
    "mxfp8": Quantizer((), _TWO, _check_mxfp8, _quantize_mxfp8, _fake_quantize_mxfp8),
    "nvfp4_to_bf16": Quantizer(
        _GLOBAL, _ONE, _check_nvfp4, _quantize_nvfp4_to_bf16, _fake_quantize_to_bf16
    ),
    "mxfp8_to_bf16": Quantizer(
        (), _ONE, _check_mxfp8, _quantize_mxfp8_to_bf16, _fake_quantize_to_bf16
    ),
}


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


for _name, _quantizer in QUANTIZERS.items():
    register(
        schema_of(f"quantize_{_name}", ("Tensor x", *_quantizer.extra), _quantizer.returns),
        check=partial(_quantizer.check, f"quantize_{_name}", "x"),
        reference=_quantizer.reference,
        fake=_quantizer.fake,
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
