"""Element types: fp32 to code and back, for E4M3, E2M1 and E8M0."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from mokernels.formats import E4M3_MAX, E8M0_NAN

# Halfway points between the neighbours of 0, 0.5, 1, 1.5, 2, 3, 4 and 6. On a tie the even code
# wins: a value that equals a bound belongs below it when the lower code is even, above it when the
# lower code is odd.
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_SCRATCH = threading.local()
_KEPT = 2**22  # elements of a scratch tensor that is kept, at most
_PIECE = 2**20  # elements decoded at a time


def divide(x: Tensor, value: float) -> Tensor:
    """X / value in fp32, correctly rounded on every device.

    Given a Python number, torch's CUDA kernels multiply by its reciprocal instead, which rounds
    twice; a tensor on the same device makes them divide.
    """
    return x.float() / torch.full((), value, dtype=torch.float32, device=x.device)


def encode_e4m3(x: Tensor) -> Tensor:
    """Round to float8_e4m3fn: nearest, ties to even, saturating at +-448; NaN stays NaN.

    Args:
        x: any shape, any float dtype; computed in fp32.

    Returns:
        float8_e4m3fn of the same shape. Infinities saturate. The clamp is explicit because torch
        versions differ in what their own cast does above 448.
    """
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def decode_e4m3(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """float8_e4m3fn (or its bytes as uint8), any shape, to fp32; exact.

    Decoding weights is most of what a model does on a CPU, and torch's own conversion takes ten
    times as long as these few passes over what the cache holds.

    Args:
        codes: any shape.
        out: fp32, contiguous, of the shape of the codes: where the values go. New by default.
    """
    return _in_pieces(_decode_e4m3, codes, out)


def _decode_e4m3(codes: Tensor, values: Tensor) -> None:
    """Sign and magnitude moved to their places in an fp16, which makes code * 2 ** -8."""
    # The sign is extended to the high byte, and its copy in the exponent's highest bit removed.
    bits = scratch("halves", torch.int16, codes.numel(), codes.device)
    bits.copy_(codes.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(~0x4000)
    values.copy_(bits.view(torch.float16)).mul_(2.0**8)
    # Bytes 0x7F and 0xFF, which came out as +-480.
    if codes.view(torch.int8).max() == 0x7F or codes.view(torch.uint8).max() == 0xFF:
        values.masked_fill_(values.abs() == 480.0, torch.nan)


def encode_e2m1(x: Tensor) -> Tensor:
    """Round to FP4 E2M1: nearest, ties to even code, saturating at +-6.

    Args:
        x: any shape, any float dtype; computed in fp32. NaN has no code in E2M1 and becomes 0x7
            (+6); quantizers carry a NaN in the block scale instead.

    Returns:
        uint8 of the same shape with the code in the low nibble: sign << 3 | magnitude index. Zero,
        of either sign, has code 0; a negative value that rounds to zero has code 8.
    """
    x = x.float()
    magnitude = x.abs()
    index = torch.zeros_like(x, dtype=torch.uint8)
    for lower_code, bound in enumerate(_E2M1_BOUNDS):
        above = magnitude > bound if lower_code % 2 == 0 else magnitude >= bound
        index += (above | magnitude.isnan()).to(torch.uint8)
    return index | ((x < 0).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """E2M1 codes (uint8, low nibble), any shape, to fp32; exact. Code 8 is -0."""
    return decode_e2m1_pairs(codes.unsqueeze(-1))[..., 0]


def decode_e2m1_pairs(packed: Tensor, out: Tensor | None = None) -> Tensor:
    """E2M1 codes packed by two in uint8 [..., K / 2], low nibble first, to fp32 [..., K]; exact.

    Args:
        packed: [..., K / 2].
        out: fp32, contiguous, [..., K]: where the values go. New by default.
    """
    return _in_pieces(_decode_e2m1_pairs, packed, out, each=2)


def _decode_e2m1_pairs(packed: Tensor, values: Tensor) -> None:
    """As :func:`_decode_e4m3`: in its place in an fp16 a code counts 2 ** -14 times itself.

    A byte becomes the two fp16 of a 32-bit word. The high nibble is moved to the word's high half,
    which machines that begin a word with its low byte read second, as it is wanted.
    """
    words, signs = (
        scratch(name, torch.int32, packed.numel(), packed.device) for name in ("halves", "signs")
    )
    words.copy_(packed)
    words.bitwise_or_(torch.bitwise_left_shift(words, 12, out=signs))
    torch.bitwise_and(words, 0x0008_0008, out=signs).bitwise_left_shift_(12)
    words.bitwise_and_(0x0007_0007).bitwise_left_shift_(9).bitwise_or_(signs)
    values.copy_(words.view(torch.float16)).mul_(2.0**14)


def decode_e8m0(exponents: Tensor) -> Tensor:
    """Shared exponents (uint8), any shape, to fp32: 2 ** (u - 127), exact; 255 is NaN."""
    bits = exponents.to(torch.int32) << 23
    # fp32's own exponents, but for the smallest, which is subnormal, and the largest.
    values = torch.where(exponents == 0, 1 << 22, bits).view(torch.float32)
    return torch.where(exponents == E8M0_NAN, torch.nan, values)


def scratch(name: str, dtype: torch.dtype, numel: int, device: torch.device) -> Tensor:
    """Memory of this thread that is used again, [numel] and uninitialised.

    Fresh pages take the system longer to give than a piece takes to decode. What one call returned
    is gone with the next call of the same name and dtype.
    """
    # Dynamo follows a graph break into here, and cannot trace what a thread keeps.
    if device.type != "cpu" or numel > _KEPT or torch.compiler.is_compiling():
        return torch.empty(numel, dtype=dtype, device=device)
    kept: Tensor | None = getattr(_SCRATCH, f"{name}_{dtype}", None)
    if kept is None or kept.numel() < numel:
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False):
            kept = torch.empty(numel, dtype=dtype)
        setattr(_SCRATCH, f"{name}_{dtype}", kept)
    return kept[:numel]


def _in_pieces(
    decode: Callable[[Tensor, Tensor], None], codes: Tensor, out: Tensor | None, each: int = 1
) -> Tensor:
    """Decode a piece at a time: a large tensor's intermediates come from the system page by page,
    which takes several times as long as the arithmetic.

    Args:
        decode: writes the values [n * each] of codes [n], n > 0.
        codes: [..., K].
        out: as of :func:`decode_e4m3`, [..., K * each].
        each: values that a code stands for.
    """
    if out is None:
        shape = (*codes.shape[:-1], codes.shape[-1] * each) if codes.dim() else codes.shape
        out = torch.empty(shape, dtype=torch.float32, device=codes.device)
    if codes.numel():
        parts = out.view(-1).split(_PIECE * each)
        for part, piece in zip(parts, codes.reshape(-1).split(_PIECE), strict=True):
            decode(piece, part)
    return out
