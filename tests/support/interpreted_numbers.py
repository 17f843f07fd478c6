"""Floats as the interpreter keeps them: numbers, or for types that numpy lacks, their bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

TORCH_DTYPES = {
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
}
FP8 = ("fp8e4nv", "fp8e5", "fp8e4b8", "fp8e5b16", "fp8e4b15")
KEPT_AS_BITS = ("bf16", *FP8)
_BIT_DTYPES = {1: (torch.uint8, np.uint8), 2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


def decode(bits: np.ndarray, name: str) -> np.ndarray:
    """Bits of Triton's float type ``name`` (uint8 or uint16, any shape) to fp32 values; exact."""
    if name == "bf16":
        words = np.asarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)
        return words.view(np.float32)
    return _values_of_codes(name)[np.asarray(bits).view(np.uint8)]


def encode(values: np.ndarray, name: str, towards_zero: bool = False) -> np.ndarray:
    """Round fp32 (or fp16) values of any shape to Triton's float type ``name``, as its bits.

    To nearest with ties to even, or towards zero. The fp8 types saturate, infinities included, as
    ``cvt.satfinite`` does; the clamp is explicit since not every torch saturates.
    """
    dtype = _torch_dtype(name)
    exact = torch.from_numpy(np.array(values, dtype=np.float32).reshape(-1))
    limit = torch.finfo(dtype).max
    rounded = (exact.clamp(-limit, limit) if name in FP8 else exact).to(dtype)
    torch_bits, numpy_bits = _BIT_DTYPES[dtype.itemsize]
    bits = rounded.view(torch_bits).clone()
    if towards_zero:
        # Magnitudes are ordered as their bits are: one less is the next value towards zero.
        bits -= (rounded.float().abs() > exact.abs()).to(bits.dtype)
    return bits.numpy().view(numpy_bits).reshape(np.shape(values))


@cache
def _values_of_codes(name: str) -> np.ndarray:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    return codes.view(_torch_dtype(name)).float().numpy()


def _torch_dtype(name: str) -> torch.dtype:
    if name not in TORCH_DTYPES:
        raise NotImplementedError(f"the repaired interpreter does not model the type {name}")
    return TORCH_DTYPES[name]


def name_of(handle: Any) -> str:
    """Name of the type of a handle's elements, or of what its pointers point to."""
    return handle.get_element_ty().name if handle.dtype.is_ptr() else handle.dtype.scalar.name


def values_of(handle: Any) -> np.ndarray:
    """What a handle stands for, as numbers: bits are decoded to fp32, the rest is as it is."""
    name = name_of(handle)
    return decode(handle.data, name) if name in KEPT_AS_BITS else handle.data
