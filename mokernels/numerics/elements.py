"""Element types: fp32 to code and back, for E4M3, E2M1 and E8M0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from mokernels.formats import E4M3_MAX, E8M0_NAN

# Halfway points between the neighbours of 0, 0.5, 1, 1.5, 2, 3, 4 and 6. On a tie the even code
# wins: a value that equals a bound belongs below it when the lower code is even, above it when the
# lower code is odd.
_E2M1_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_SIGN_OF_16 = -(2**15)
_PIECE = 2**18  # in cache, and enough for eight threads


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


def decode_e4m3(codes: Tensor) -> Tensor:
    """float8_e4m3fn (or its bytes as uint8), any shape, to fp32; exact.

    Decoding weights is most of what a model does on a CPU, and torch's own conversion takes five to
    ten times as long as these formulas: one of few passes, and one that compilers fuse into one.
    """
    return _fused_e4m3(codes) if _is_traced(codes) else in_pieces(_eager_e4m3, codes)


def _eager_e4m3(codes: Tensor) -> Tensor:
    """Sign and magnitude moved to their places in an fp16, which makes code * 2 ** -8.

    The magnitude 0x7F gets fp16's largest exponent too, and is NaN there as here.
    """
    bits = codes.view(torch.int8).to(torch.int16)  # the sign is extended to the high byte
    magnitude = bits & 0x7F
    nan = (magnitude + 1).bitwise_and_(0x80)
    moved = magnitude.bitwise_or_(nan).bitwise_left_shift_(7)
    moved.bitwise_or_(bits.bitwise_and_(_SIGN_OF_16))
    return moved.view(torch.float16).float().mul_(2.0**8)


def _fused_e4m3(codes: Tensor) -> Tensor:
    """Regular magnitudes with fp32's exponent, subnormal ones as integers: no subnormal of fp32.

    Only operations on 32 bits, which Inductor vectorises.
    """
    bits = codes.view(torch.uint8).to(torch.int32)
    magnitude = bits & 0x7F
    regular = ((magnitude << 20) + (120 << 23)).view(torch.float32)
    value = torch.where(magnitude < 8, magnitude.to(torch.float32) * 2.0**-9, regular)
    value = torch.where(magnitude == 0x7F, torch.nan, value)
    return torch.where(bits >= 128, -value, value)


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
    return _fused_e2m1(codes) if _is_traced(codes) else in_pieces(_eager_e2m1, codes)


def _eager_e2m1(codes: Tensor) -> Tensor:
    """As :func:`_eager_e4m3`: in its place in an fp16 a code counts 2 ** -14 times itself."""
    bits = codes.to(torch.int16)
    moved = (bits & 7).bitwise_left_shift_(9)
    moved.bitwise_or_(bits.bitwise_and_(8).bitwise_left_shift_(12))
    return moved.view(torch.float16).float().mul_(2.0**14)


def _fused_e2m1(codes: Tensor) -> Tensor:
    """As :func:`_fused_e4m3`."""
    bits = codes.to(torch.int32)
    magnitude = bits & 7
    regular = ((magnitude << 22) + (126 << 23)).view(torch.float32)
    value = torch.where(magnitude < 2, magnitude.to(torch.float32) * 0.5, regular)
    return torch.where((bits & 8) > 0, -value, value)


def decode_e8m0(exponents: Tensor) -> Tensor:
    """Shared exponents (uint8), any shape, to fp32: 2 ** (u - 127), exact; 255 is NaN."""
    bits = exponents.to(torch.int32) << 23
    # fp32's own exponents, but for the smallest, which is subnormal, and the largest.
    values = torch.where(exponents == 0, 1 << 22, bits).view(torch.float32)
    return torch.where(exponents == E8M0_NAN, torch.nan, values)


def in_pieces(formula: Callable[[Tensor], Tensor], codes: Tensor, each: int = 1) -> Tensor:
    """``formula(codes)``, fp32, a piece at a time: a large tensor's intermediates come from the
    system page by page, which takes several times as long as the arithmetic.

    Args:
        formula: from codes [n] to values [n * each].
        codes: [..., K].
        each: values that a code stands for.

    Returns:
        [..., K * each].
    """
    if _is_traced(codes) or codes.numel() <= _PIECE:
        return formula(codes)
    shape = (*codes.shape[:-1], codes.shape[-1] * each)
    values = torch.empty(shape, dtype=torch.float32, device=codes.device)
    parts = values.view(-1).split(_PIECE * each)
    for part, piece in zip(parts, codes.reshape(-1).split(_PIECE), strict=True):
        part.copy_(formula(piece))
    return values


def _is_traced(tensor: Tensor) -> bool:
    """Whether a graph is being made of these operations, instead of running them."""
    return bool(torch.compiler.is_compiling() or is_fake(tensor))
