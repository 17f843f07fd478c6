"""FP8 (E4M3): one scale per tensor, per row, per 1x128 or per 128x128 block.

Activations follow ModelOpt's fake quantization to the bit: with the multiplier m = 448 / amax, the
codes are E4M3(clamp(x * m, +-448)) and the scale is 1 / m, all in fp32. Weights follow ModelOpt's
*export*, which divides by the stored scale instead.

"448 / amax" is not one division: torch computes ``448.0 / tensor`` as ``tensor.reciprocal() *
448``, which rounds twice and gives another m than IEEE division for a quarter of all amax. What
ModelOpt computes carries that; so it is written out here, and every kernel does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mokernels.errors import ArgumentError
from mokernels.formats import E4M3_MAX, FP8_BLOCK, FP8_TINY_AMAX
from mokernels.numerics.elements import decode_e4m3, divide, encode_e4m3
from mokernels.numerics.product import CodedWeight


def fp8_multiplier(amax: Tensor) -> Tensor:
    """M = 448 / amax in fp32; an amax of at most 2**-24 counts as 1, so that its codes are 0."""
    amax = amax.float()
    return E4M3_MAX / torch.where(amax <= FP8_TINY_AMAX, torch.ones_like(amax), amax)


def static_fp8_scales(input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (m, 1 / m) that a stored ``input_scale`` means, fp32, of its shape.

    ModelOpt stores amax / 448; amax = 448 * input_scale gives the calibrated amax back. Multiplying
    codes by ``input_scale`` itself instead of 1 / m misses ModelOpt's values by an ulp.
    """
    multiplier = fp8_multiplier(E4M3_MAX * input_scale.float())
    return multiplier, multiplier.reciprocal()


def quantize_fp8(x: Tensor, multiplier: Tensor) -> Tensor:
    """E4M3(clamp(x * multiplier, +-448)) of x [...]; ``multiplier`` is fp32 and broadcasts."""
    return encode_e4m3(x.float() * multiplier.float())


def quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale per token.

    Args:
        x: [..., K], any float dtype.

    Returns:
        Codes, float8_e4m3fn [..., K], and scales, fp32 [...]. A token of zeros (or of amax at most
        2**-24) has codes 0 and scale 1 / 448.
    """
    multiplier = fp8_multiplier(_amax(x))
    return quantize_fp8(x, multiplier.unsqueeze(-1)), multiplier.reciprocal()


def quantize_fp8_per_block(x: Tensor) -> tuple[Tensor, Tensor]:
    """One scale per 128 consecutive elements of a token (1x128); the last block may be short.

    Args:
        x: [..., K], any float dtype.

    Returns:
        Codes, float8_e4m3fn [..., K], and scales, fp32 [..., ceil(K / 128)].
    """
    k = x.shape[-1]
    blocks = pad(x.float(), (0, -k % FP8_BLOCK)).unflatten(-1, (-(-k // FP8_BLOCK), FP8_BLOCK))
    multiplier = fp8_multiplier(_amax(blocks))
    codes = quantize_fp8(blocks, multiplier.unsqueeze(-1)).flatten(-2)
    return codes[..., :k].contiguous(), multiplier.reciprocal()


def quantize_fp8_tensor_weight(weight: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ModelOpt's FP8 export of a weight [N, K]: codes and the scale [] = amax / 448.

    The quotient weight / scale is rounded to the weight's own dtype before it becomes E4M3, because
    ModelOpt divides by a zero-dimensional fp32 tensor, which does not promote. For a bf16 weight
    that rounds twice; it is reproduced because exports have to agree bit for bit. It is written out
    so that every device does what torch does on a CPU: CUDA rounds such a divisor, the scale, to
    the weight's dtype before it divides. ``amax``, fp32 [], is that of the whole weight where
    ``weight`` is a part of its rows.
    """
    scale = _positive_scale(weight.abs().amax().float() if amax is None else amax)
    return encode_e4m3((weight.float() / scale).to(weight.dtype)), scale


def quantize_fp8_channel_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """ModelOpt's FP8_PER_CHANNEL_PER_TOKEN export of a weight [N, K]: codes and scales [N]."""
    scale = _positive_scale(_amax(weight))
    return encode_e4m3(weight.float() / scale.unsqueeze(-1)), scale


def quantize_fp8_block_weight(weight: Tensor, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ModelOpt's FP8_PB_WO export of a weight [N, K].

    Args:
        weight: [N, K].
        amax: fp32 [], for every block; each block's own by default. ModelOpt shares it between
            layers of one input whose weight fits one block.

    Returns:
        Codes [N, K] and scales fp32 [ceil(N / 128), 1, ceil(K / 128), 1] (of no dimension when the
        weight fits one block), as ModelOpt stores them. Short blocks at the end are padded by 0.
    """
    n, k = weight.shape
    padded = pad(weight.float(), (0, -k % FP8_BLOCK, 0, -n % FP8_BLOCK))
    blocks = padded.unflatten(1, (-1, FP8_BLOCK)).unflatten(0, (-1, FP8_BLOCK))
    own = blocks.abs().amax(dim=(1, 3))
    scale = _positive_scale(own if amax is None else amax.expand_as(own))
    codes = encode_e4m3(weight.float() / expand_fp8_scale(scale, n, k))
    return codes, scale.reshape(()) if scale.numel() == 1 else scale[:, None, :, None]


def expand_fp8_scale(scale: Tensor, rows: int, k: int) -> Tensor:
    """Bring an FP8 scale to a shape that broadcasts against [rows, k].

    Args:
        scale: fp32, one of [] (or [1]), [rows], [rows, ceil(k / 128)], [ceil(rows / 128),
            ceil(k / 128)] or ModelOpt's [ceil(rows / 128), 1, ceil(k / 128), 1].
        rows: number of rows of the codes.
        k: number of columns of the codes.

    Raises:
        ArgumentError: the shape fits none of these.
    """
    columns = -(-k // FP8_BLOCK)
    if scale.dim() == 4:
        scale = scale[:, 0, :, 0]
    if scale.dim() == 0:
        return scale
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.shape == (rows,):
        return scale.unsqueeze(-1)
    if scale.shape == (rows, columns):
        return scale.repeat_interleave(FP8_BLOCK, dim=1)[:, :k]
    if scale.shape == (-(-rows // FP8_BLOCK), columns):
        by_row = scale.repeat_interleave(FP8_BLOCK, dim=0)[:rows]
        return by_row.repeat_interleave(FP8_BLOCK, dim=1)[:, :k]
    raise ArgumentError(
        f"A scale of shape {tuple(scale.shape)} fits no granularity of FP8 codes [{rows}, {k}]: "
        f"wanted [], [{rows}], [{rows}, {columns}] (1x128) or "
        f"[{-(-rows // FP8_BLOCK)}, {columns}] (128x128)."
    )


def dequantize_fp8(
    codes: Tensor,
    scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Codes * scale in fp32, rounded once to ``out_dtype``.

    Args:
        codes: float8_e4m3fn [..., K]; the leading dimensions count as rows.
        scale: any granularity that :func:`expand_fp8_scale` knows, over [rows, K]; the scales of
            tokens may keep the leading dimensions of the codes.
        out_dtype: of the result.
        out: fp32, contiguous, [..., K]: where the values go before they are rounded.

    Returns:
        [..., K].
    """
    values = decode_e4m3(codes, out)
    rows = values.flatten(0, -2) if codes.dim() > 1 else values.unsqueeze(0)
    columns = -(-codes.shape[-1] // FP8_BLOCK)
    if scale.shape == codes.shape[:-1] and codes.dim() != 2:
        scale = scale.reshape(-1)
    elif scale.shape == (*codes.shape[:-1], columns) and codes.dim() != 2:
        scale = scale.reshape(-1, columns)
    rows.mul_(expand_fp8_scale(scale.float(), *rows.shape))
    return values.to(out_dtype)


def fp8_weight(codes: Tensor, scale: Tensor) -> CodedWeight:
    """A weight [N, K] whose rows :func:`dequantize_fp8` gives.

    Args:
        codes: float8_e4m3fn [N, K].
        scale: fp32, of any granularity that :func:`expand_fp8_scale` knows for weights.
    """
    n, k = codes.shape
    if scale.dim() == 4:
        scale = scale[:, 0, :, 0]
    by_block = scale.dim() == 2 and scale.numel() > 1

    def decode(rows: slice, out: Tensor) -> None:
        if by_block:
            # A row of blocks at a time: its scales stay in the cache.
            decode_e4m3(codes[rows], out)
            factors = scale.float()[rows.start // FP8_BLOCK :].repeat_interleave(FP8_BLOCK, 1)
            for block, factor in zip(out.split(FP8_BLOCK), factors[:, :k], strict=False):
                block.mul_(factor)
        else:
            dequantize_fp8(codes[rows], scale[rows] if scale.numel() > 1 else scale, out=out)

    return CodedWeight((n, k), decode)


def _amax(x: Tensor) -> Tensor:
    """Max |x| over the last dimension, fp32; 0 where that dimension is empty."""
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1], dtype=torch.float32)
    return x.abs().amax(dim=-1).float()


def _positive_scale(amax: Tensor) -> Tensor:
    """Amax / 448 in fp32, and 1 for an amax of zero.

    ModelOpt's own exporter writes scale 0 and NaN codes for an all-zero row; that is the one place
    where our weights differ from its (a scale of 1 gives the row's zeros back).
    """
    return torch.where(amax == 0, torch.ones_like(amax), divide(amax, E4M3_MAX))
