"""NVFP4: E2M1 elements, one E4M3 scale per 16 of them, one fp32 scale over all."""

from __future__ import annotations

import torch
from torch import Tensor

from mokernels.errors import ArgumentError
from mokernels.formats import E2M1_MAX, E4M3_MAX, NVFP4_BLOCK, NVFP4_TINY_SCALE
from mokernels.numerics.elements import (
    decode_e2m1_pairs,
    decode_e4m3,
    divide,
    encode_e2m1,
    encode_e4m3,
)
from mokernels.numerics.packing import pack_nibbles
from mokernels.numerics.product import CodedWeight

_SMALLEST_GLOBAL_SCALE = 1e-12
_SMALLEST_BLOCK_SCALE = 2.0**-9


def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations as ModelOpt's dynamic-block fake quantization does, to the bit.

    With g the global scale, a block's scale is s = E4M3(min(amax / (6 g), 448)) and its codes are
    E2M1(x / (s g)). Where s g < 1e-5 ModelOpt divides by 1 instead, which gives zeros for every g
    that a load accepts: such a block gets scale 0 and codes 0 here. Blocks whose amax exceeds the
    calibrated one saturate.

    Args:
        x: [..., K], any float dtype, K a multiple of 16.
        global_scale: fp32 [], the checkpoint's ``input_scale`` = amax / (6 * 448); a value that is
            not positive counts as 1e-12.

    Returns:
        Codes, uint8 [..., K / 2] (even K index in the low nibble), and block scales,
        float8_e4m3fn [..., K / 16]; the value of a code is code * (s * g).

    Raises:
        ArgumentError: K is not a multiple of 16.
    """
    blocks = _blocks(x, "x")
    g = global_scale.float()
    g = torch.where(g > 0, g, torch.full_like(g, _SMALLEST_GLOBAL_SCALE))
    amax = blocks.abs().amax(dim=-1)
    scale = encode_e4m3(torch.clamp(amax / (E2M1_MAX * g), max=E4M3_MAX))
    step = scale.float() * g
    # Not `step < tiny`: that is false for a NaN, which has to stay.
    tiny = step < NVFP4_TINY_SCALE
    codes = encode_e2m1(blocks / torch.where(tiny, torch.ones_like(step), step).unsqueeze(-1))
    codes = codes.masked_fill(tiny.unsqueeze(-1), 0)
    scale = torch.where(tiny, torch.zeros_like(amax), scale.float()).to(torch.float8_e4m3fn)
    return pack_nibbles(codes.flatten(-2)), scale


def quantize_nvfp4_weight(
    weight: Tensor, global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize a weight as ModelOpt's export does.

    Args:
        weight: [N, K], K a multiple of 16.
        global_scale: fp32 [], amax / (6 * 448); from the weight itself when None. Layers that are
            fused when served (q/k/v, gate/up) share the largest.

    Returns:
        Codes uint8 [N, K / 2], block scales float8_e4m3fn [N, K / 16], global scale fp32 []. A zero
        block keeps the scale 1 that ModelOpt gives it; block scales are at least 2**-9.

    Raises:
        ArgumentError: K is not a multiple of 16.
    """
    blocks = _blocks(weight, "weight")
    amax = blocks.abs().amax(dim=-1)
    if global_scale is None:
        global_scale = divide(weight.abs().amax(), E2M1_MAX * E4M3_MAX)
    # An all-zero weight has no scale; 1 gives its zeros back where ModelOpt writes NaN.
    safe = torch.where(global_scale > 0, global_scale, torch.ones_like(global_scale))
    scale = amax / (E2M1_MAX * safe)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scale = encode_e4m3(scale.clamp(min=_SMALLEST_BLOCK_SCALE))
    codes = encode_e2m1(blocks / (scale.float() * safe).unsqueeze(-1))
    return pack_nibbles(codes.flatten(-2)), scale, safe


def dequantize_nvfp4(
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Code * (block scale * global scale) in fp32, rounded once to ``out_dtype``.

    Args:
        codes: uint8 [..., K / 2].
        block_scale: float8_e4m3fn [..., K / 16].
        global_scale: fp32, of a shape that broadcasts against the block scales.
        out_dtype: of the result [..., K].
        out: fp32, contiguous, [..., K]: where the values go before they are rounded.
    """
    values = decode_e2m1_pairs(codes, out)
    step = decode_e4m3(block_scale) * global_scale.float()
    values.unflatten(-1, (-1, NVFP4_BLOCK)).mul_(step.unsqueeze(-1))
    return values.to(out_dtype)


def nvfp4_weight(codes: Tensor, block_scale: Tensor, global_scale: Tensor) -> CodedWeight:
    """A weight [N, K] whose rows :func:`dequantize_nvfp4` gives.

    Args:
        codes: uint8 [N, K / 2].
        block_scale: float8_e4m3fn [N, K / 16].
        global_scale: fp32, one ([] or [1]) or one for each row ([N]).
    """

    def decode(rows: slice, out: Tensor) -> Tensor:
        scale = global_scale.reshape(-1, 1)
        scale = scale[rows] if len(scale) > 1 else scale
        return dequantize_nvfp4(codes[rows], block_scale[rows], scale, out=out)

    return CodedWeight((codes.shape[0], 2 * codes.shape[1]), decode)


def _blocks(x: Tensor, name: str) -> Tensor:
    """[..., K] to fp32 [..., K / 16, 16]."""
    if x.shape[-1] % NVFP4_BLOCK:
        raise ArgumentError(
            f"NVFP4 needs a last dimension that is a multiple of {NVFP4_BLOCK}, but {name} has "
            f"shape {tuple(x.shape)}. Pad it, or leave this layer unquantized."
        )
    return x.float().unflatten(-1, (x.shape[-1] // NVFP4_BLOCK, NVFP4_BLOCK))
