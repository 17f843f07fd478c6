"""The kinds of product: what is multiplied, and by which instructions."""

from __future__ import annotations

import enum


class Kind(enum.Enum):
    """What is multiplied, in which dtype, and when scales enter."""

    FP8 = "fp8"
    """E4M3 by E4M3, scales after the sum."""
    FP8_FAST = "fp8_fast"
    """The same with Hopper's own accumulator for the whole of K."""
    FP8_BLOCK = "fp8_block"
    """E4M3 by E4M3, scales per 128 of K."""
    HALF_FP8 = "half_fp8"
    """16-bit by E4M3, scales after the sum."""
    HALF_BLOCK = "half_block"
    """16-bit by E4M3, scales per 128 of K."""
    HALF_NVFP4 = "half_nvfp4"
    """16-bit by NVFP4, decoded and scaled in registers."""
    HALF_MXFP8 = "half_mxfp8"
    """16-bit by MXFP8, decoded and scaled in registers."""
    GEMV_NVFP4 = "gemv_nvfp4"
    """One row of 16-bit or fp32 numbers by NVFP4, without a matrix instruction."""
    GEMV_FP8 = "gemv_fp8"
    """One row of 16-bit numbers by E4M3, scales after the sum, without a matrix instruction."""
    GEMV_BLOCK = "gemv_block"
    """The same with scales per 128 of K."""
    GEMV_MXFP8 = "gemv_mxfp8"
    """One row of 16-bit numbers by MXFP8, without a matrix instruction."""
    FP32 = "fp32"
    """fp32 by any weight, decoded, with IEEE multiplications."""
    NVFP4 = "nvfp4"
    """NVFP4 by NVFP4 on matrix units that apply block scales."""
    MXFP8 = "mxfp8"
    """MXFP8 by MXFP8 on matrix units that apply block scales."""


GEMVS = (Kind.GEMV_NVFP4, Kind.GEMV_FP8, Kind.GEMV_BLOCK, Kind.GEMV_MXFP8)
"""Kinds of one row, by fp32 multiply-adds: threads' sums are added at the end, in an order that
tile and warps decide."""
