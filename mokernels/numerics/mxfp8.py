"""MXFP8: E4M3 elements, one power of two per 32 of them (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

import torch
from torch import Tensor

from mokernels.errors import ArgumentError
from mokernels.formats import E8M0_BIAS, MXFP8_BLOCK
from mokernels.numerics.elements import decode_e4m3, decode_e8m0, encode_e4m3
from mokernels.numerics.product import CodedWeight


def quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations as ModelOpt's MX fake quantization does, to the bit.

    A block's exponent is ceil(log2(amax / 448)), computed exactly and clamped to +-127; a block
    whose amax is zero, infinite or NaN has exponent 0.

    Args:
        x: [..., K], any float dtype, K a multiple of 32.

    Returns:
        Codes, float8_e4m3fn [..., K], and exponents, uint8 [..., K / 32], biased by 127.

    Raises:
        ArgumentError: K is not a multiple of 32.
    """
    blocks = _blocks(x, "x")
    amax = blocks.abs().amax(dim=-1)
    exponent = _exponent(amax).clamp(-E8M0_BIAS, E8M0_BIAS)
    exponent = exponent.masked_fill((amax == 0) | ~amax.isfinite(), 0)
    return _encode(blocks, exponent)


def quantize_mxfp8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a weight [N, K] as ModelOpt's export does.

    The same as :func:`quantize_mxfp8` except that an all-zero block has the exponent byte 0.
    """
    blocks = _blocks(weight, "weight")
    amax = blocks.abs().amax(dim=-1)
    exponent = _exponent(amax).clamp(-E8M0_BIAS, E8M0_BIAS)
    exponent = exponent.masked_fill(amax == 0, -E8M0_BIAS)
    return _encode(blocks, exponent)


def dequantize_mxfp8(
    codes: Tensor,
    exponents: Tensor,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Code * 2 ** (u - 127) in fp32, rounded once to ``out_dtype``.

    Args:
        codes: float8_e4m3fn [..., K].
        exponents: uint8 [..., K / 32].
        out_dtype: of the result [..., K].
        out: fp32, contiguous, [..., K]: where the values go before they are rounded.
    """
    values = decode_e4m3(codes, out)
    blocks = values.unflatten(-1, (exponents.shape[-1], MXFP8_BLOCK))
    blocks.mul_(decode_e8m0(exponents).unsqueeze(-1))
    return values.to(out_dtype)


def mxfp8_weight(codes: Tensor, exponents: Tensor) -> CodedWeight:
    """A weight [N, K] whose rows :func:`dequantize_mxfp8` gives, from its two tensors."""

    def decode(rows: slice, out: Tensor) -> Tensor:
        return dequantize_mxfp8(codes[rows], exponents[rows], out=out)

    return CodedWeight((codes.shape[0], codes.shape[1]), decode)


def _encode(blocks: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    # exp2 of fp32 is not exact on every device. The product is, unless it falls below 2 ** -126,
    # where every value is far below half of the smallest code.
    step = torch.exp2(-exponent.double()).float().unsqueeze(-1)
    codes = encode_e4m3(blocks * step)
    return codes.flatten(-2), (exponent + E8M0_BIAS).to(torch.uint8)


def _exponent(amax: Tensor) -> Tensor:
    """ceil(log2(amax / 448)) as int32, exactly; meaningless where amax is 0 or not finite.

    448 = 0.875 * 2 ** 9, so with amax = f * 2 ** x, f in [0.5, 1), it is x - 9, or one more where
    f > 0.875. Comparing mantissas avoids a division, whose rounding differs between devices.
    """
    mantissa, exponent = torch.frexp(amax)
    return exponent - 9 + (mantissa > 0.875).to(exponent.dtype)


def _blocks(x: Tensor, name: str) -> Tensor:
    """[..., K] to fp32 [..., K / 32, 32]."""
    if x.shape[-1] % MXFP8_BLOCK:
        raise ArgumentError(
            f"MXFP8 needs a last dimension that is a multiple of {MXFP8_BLOCK}, but {name} has "
            f"shape {tuple(x.shape)}. Pad it, or leave this layer unquantized."
        )
    return x.float().unflatten(-1, (x.shape[-1] // MXFP8_BLOCK, MXFP8_BLOCK))
