"""Argument checks that the CPU, fake and Triton implementations of the operators share."""

from __future__ import annotations

import torch
from torch import Tensor

from mokernels.errors import ArgumentError
from mokernels.formats import FP8_BLOCK, MXFP8_BLOCK, NVFP4_BLOCK

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def out_dtype_of(op: str, name: str) -> torch.dtype:
    """The dtype called ``name``; operators take strings, which every torch exporter can store."""
    dtype = OUT_DTYPES.get(name)
    if dtype is None:
        raise ArgumentError(
            f"mokernels::{op}: out_dtype is {name!r}, wanted one of {', '.join(OUT_DTYPES)}."
        )
    return dtype


def dtype_or(op: str, name: str | None, default: torch.dtype) -> torch.dtype:
    """The dtype called ``name``, or the default if there is none."""
    return default if name is None else out_dtype_of(op, name)


def check_float(op: str, name: str, x: Tensor) -> None:
    """``x`` is a bf16, fp16 or fp32 tensor with at least one dimension."""
    if x.dtype not in FLOAT_DTYPES or x.dim() == 0:
        raise ArgumentError(
            f"mokernels::{op}: {name} is {describe(x)}, wanted bfloat16, float16 or float32 with "
            "at least one dimension. Convert it first."
        )


def check_dtype(op: str, name: str, x: Tensor, dtype: torch.dtype) -> None:
    """``x`` has exactly this dtype."""
    if x.dtype != dtype:
        raise ArgumentError(f"mokernels::{op}: {name} is {describe(x)}, wanted {_short(dtype)}.")


def check_multiple(op: str, name: str, x: Tensor, block: int, per_item: int = 1) -> None:
    """The last dimension of ``x`` holds a whole number of blocks of ``block`` elements."""
    if (x.shape[-1] * per_item) % block:
        raise ArgumentError(
            f"mokernels::{op}: the last dimension of {name} {describe(x)} holds "
            f"{x.shape[-1] * per_item} elements, wanted a multiple of {block}. Pad it, or leave "
            "this layer unquantized."
        )


def check_shape(op: str, name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """``x`` has exactly this dtype and shape."""
    check_dtype(op, name, x, dtype)
    if tuple(x.shape) != tuple(shape):
        raise ArgumentError(
            f"mokernels::{op}: {name} is {describe(x)}, wanted shape {list(shape)}."
        )


def check_scalar(op: str, name: str, x: Tensor) -> None:
    """``x`` is one fp32 number, of shape [] or [1]."""
    check_dtype(op, name, x, torch.float32)
    if tuple(x.shape) not in ((), (1,)):
        raise ArgumentError(f"mokernels::{op}: {name} is {describe(x)}, wanted shape [].")


def check_bias(op: str, bias: Tensor | None, n: int) -> None:
    """``bias`` is None or a float vector of N."""
    if bias is not None and (bias.dtype not in FLOAT_DTYPES or tuple(bias.shape) != (n,)):
        raise ArgumentError(
            f"mokernels::{op}: bias is {describe(bias)}, wanted shape [{n}] in bfloat16, float16 "
            "or float32."
        )


def check_inner(op: str, x: Tensor, weight: Tensor, x_items: int, weight_items: int) -> None:
    """``x [..., K]`` and ``weight [N, K]`` agree on K, counted in elements."""
    if weight.dim() != 2 or x.dim() == 0 or x_items != weight_items:
        raise ArgumentError(
            f"mokernels::{op}: the operands do not fit: activations {describe(x)} and weight "
            f"{describe(weight)}, wanted [..., K] and [N, K] with the same K (the weight as the "
            "checkpoint stores it, not transposed)."
        )


def check_fp8_weight(op: str, x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """An FP8 weight [N, K] with a scale [], [N] or [ceil(N / 128), ceil(K / 128)]."""
    check_dtype(op, "the weight", weight, torch.float8_e4m3fn)
    check_inner(op, x, weight, x.shape[-1] if x.dim() else 0, weight.shape[-1])
    check_weight_scale(op, scale, *weight.shape)


def check_weight_scale(op: str, scale: Tensor, n: int, k: int) -> None:
    """``scale`` of an FP8 weight [n, k]; its rank says its granularity."""
    check_dtype(op, "the weight's scale", scale, torch.float32)
    blocks = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
    if tuple(scale.shape) not in ((), (1,), (n,), blocks):
        raise ArgumentError(
            f"mokernels::{op}: the weight's scale is {describe(scale)}, wanted [] (per tensor), "
            f"[{n}] (per channel) or {list(blocks)} (128x128 blocks) for a weight [{n}, {k}]."
        )


def check_activation_scale(op: str, scale: Tensor, a: Tensor) -> None:
    """``scale`` of FP8 activations [..., K]: [], [...] or [..., ceil(K / 128)]."""
    check_dtype(op, "scale_a", scale, torch.float32)
    lead = tuple(a.shape[:-1])
    blocks = (*lead, -(-a.shape[-1] // FP8_BLOCK))
    if tuple(scale.shape) not in ((), lead, blocks) and tuple(scale.shape) != (1,):
        raise ArgumentError(
            f"mokernels::{op}: scale_a is {describe(scale)}, wanted [] (per tensor), {list(lead)} "
            f"(per token) or {list(blocks)} (1x128 blocks) for activations {list(a.shape)}."
        )


def check_nvfp4_weight(
    op: str, x: Tensor, k: int, weight: Tensor, scale: Tensor, global_scale: Tensor
) -> None:
    """An NVFP4 weight: uint8 [N, K / 2], block scales e4m3 [N, K / 16], global scale [] or [N]."""
    check_dtype(op, "the weight", weight, torch.uint8)
    check_inner(op, x, weight, k, weight.shape[-1] * 2)
    check_multiple(op, "the weight", weight, NVFP4_BLOCK, per_item=2)
    shape = (weight.shape[0], k // NVFP4_BLOCK)
    check_shape(op, "the weight's block scale", scale, torch.float8_e4m3fn, shape)
    check_dtype(op, "the weight's global scale", global_scale, torch.float32)
    if tuple(global_scale.shape) not in ((), (1,), (weight.shape[0],)):
        raise ArgumentError(
            f"mokernels::{op}: the weight's global scale is {describe(global_scale)}, wanted [], "
            f"or [{weight.shape[0]}] where rows of several weights stand in one."
        )


def check_mxfp8_weight(op: str, x: Tensor, weight: Tensor, scale: Tensor) -> None:
    """An MXFP8 weight: float8_e4m3fn [N, K] with exponents uint8 [N, K / 32]."""
    check_dtype(op, "the weight", weight, torch.float8_e4m3fn)
    check_inner(op, x, weight, x.shape[-1] if x.dim() else 0, weight.shape[-1])
    check_multiple(op, "the weight", weight, MXFP8_BLOCK)
    shape = (weight.shape[0], weight.shape[1] // MXFP8_BLOCK)
    check_shape(op, "the weight's exponents", scale, torch.uint8, shape)


def describe(x: Tensor) -> str:
    """Dtype and shape of a tensor, for messages."""
    return f"{_short(x.dtype)} {list(x.shape)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
