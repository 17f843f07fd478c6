"""Element types inside a kernel: fp32 to code and back, for E4M3, E2M1 and E8M0.

The definition is :mod:`mokernels.numerics.elements`; every function here agrees with it to the bit
(any NaN counts as any other). Codes are uint8 tensors of any shape, also where the target has an
fp8 type: a pointer to bytes can be had on every target, and a bitcast costs nothing.

Two constexpr flags come from the target: ``CASTS_ONCE`` is ``Target.casts_fp8_once`` and
``HAS_TYPE`` is ``Target.has_fp8_type``. Without them E4M3 is encoded and decoded by its bits.

Where a product is added to something, the fused multiply-add is written out; nothing else can be
contracted, since the values that rounding constants are added to are no products but magnitudes.
"""

import triton
import triton.language as tl

E4M3_MIN_NORMAL_BITS: tl.constexpr = tl.constexpr(0x3C800000)  # 2 ** -6 as fp32
E4M3_MAX_CODE: tl.constexpr = tl.constexpr(0x7E)  # 448
E4M3_NAN_CODE: tl.constexpr = tl.constexpr(0x7F)
FP32_INF_BITS: tl.constexpr = tl.constexpr(0x7F800000)


@triton.jit
def encode_e4m3(x, CASTS_ONCE: tl.constexpr):
    """fp32 to E4M3 codes: nearest, ties to even, saturating (also infinities); NaN stays NaN."""
    if CASTS_ONCE:
        # cvt.rn.satfinite: infinities become 448 and NaN stays.
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # E4M3 keeps 3 of 23 mantissa bits, so 20 go; half of what goes, less one, plus the last bit
    # that stays is the round-to-even increment. A carry into the exponent is the right answer.
    rounded = magnitude + 0x7FFFF + ((magnitude >> 20) & 1)
    # Exponents are biased by 127 and by 7.
    normal = tl.minimum((rounded >> 20).to(tl.int32) - (120 << 3), E4M3_MAX_CODE)
    # Below 2**-6 the codes are the multiples of 2**-9. That is the spacing of fp32 in
    # [2**14, 2**15), so that adding 2**14 rounds, and the low bits of the sum count them.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) & 0xF
    code = tl.where(magnitude < E4M3_MIN_NORMAL_BITS, subnormal, normal)
    code = tl.where(magnitude > FP32_INF_BITS, E4M3_NAN_CODE, code)
    return (code | ((bits >> 24) & 0x80).to(tl.int32)).to(tl.uint8)


@triton.jit
def decode_e4m3(code, DTYPE: tl.constexpr, HAS_TYPE: tl.constexpr, KEEP_NAN: tl.constexpr = True):
    """E4M3 codes to fp32, fp16 or bf16, exactly.

    ``KEEP_NAN = False`` saves two instructions and decodes the NaN codes as +-480.
    """
    if HAS_TYPE:
        return code.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    # Exponent and mantissa are moved to the wider type's places; its exponents are biased by more,
    # which one multiplication puts right, for subnormal codes as well.
    if DTYPE == tl.float32:
        word = code.to(tl.uint32)
        moved = ((word & 0x80) << 24) | ((word & 0x7F) << 20)
        value = moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120
    elif DTYPE == tl.float16:
        word = code.to(tl.uint16)
        moved = ((word & 0x80) << 8) | ((word & 0x7F) << 7)
        value = moved.to(tl.float16, bitcast=True) * 256.0
    else:
        word = code.to(tl.uint16)
        moved = ((word & 0x80) << 8) | ((word & 0x7F) << 4)
        value = moved.to(tl.bfloat16, bitcast=True) * 1.329227995784916e36
    if KEEP_NAN:
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    return value.to(DTYPE)


@triton.jit
def fnuz_of_e4m3(codes):
    """E4M3 codes [R, K] to codes of e4m3fnuz, CDNA 3's own, that have exactly half their values.

    Its exponents are biased by one more, so that nearly all codes stay. -0 becomes 0, since there
    is one zero, whose negative is NaN; and NaN that one, since its codes are numbers there.
    Four codes are taken at a time, as a word of 32 bits, which they are in memory and in the
    matrix instruction: LLVM sees that, and leaves no trace of taking them together and apart.
    """
    words = word_of_bytes(codes)
    magnitudes = words & 0x7F7F7F7F
    # One less than a sign's bit more carries into it from any magnitude but 0, 1 from NaN's alone.
    keep = (magnitudes + 0x7F7F7F7F) | 0x7F7F7F7F
    nan = (magnitudes + 0x01010101) & 0x80808080
    # Of NaN's codes nothing stays.
    keep &= 0xFFFFFFFF ^ (nan - (nan >> 7))
    return bytes_of_word((words & keep) | nan)


@triton.jit
def word_of_bytes(x):
    """Bytes [R, K] as uint32 [R, K / 4]; the first of four is the lowest."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2)))
    first, third = tl.split(even.to(tl.uint32))
    second, fourth = tl.split(odd.to(tl.uint32))
    return first | (second << 8) | (third << 16) | (fourth << 24)


@triton.jit
def bytes_of_word(words):
    """Inverse of word_of_bytes."""
    even = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
    odd = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
    return tl.reshape(tl.join(even, odd), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def e2m1_of_magnitude(magnitude):
    """Codes 0 to 7 (int32) of fp32 magnitudes from 0 to 6: nearest, ties to even."""
    bits = magnitude.to(tl.int32, bitcast=True)
    # From 1 up E2M1 is a float with one mantissa bit: 22 of 23 go (see encode_e4m3). Exponents are
    # biased by 127 and by 1.
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - (126 << 1)
    # Below 1 the codes are multiples of 1/2, the spacing of fp32 in [2**22, 2**23).
    small = (magnitude + 4194304.0).to(tl.int32, bitcast=True) & 0x3
    return tl.where(magnitude < 1.0, small, normal)


@triton.jit
def encode_e2m1(x):
    """fp32 to E2M1 codes (low nibble): nearest, ties to even, saturating at +-6.

    NaN becomes 7 (+6). Zero of either sign is 0; a negative value that rounds to zero is 8.
    """
    # tl.minimum drops NaN: its magnitude becomes 6.
    code = e2m1_of_magnitude(tl.minimum(tl.abs(x), 6.0))
    return (code | tl.where(x < 0, 8, 0)).to(tl.uint8)


@triton.jit
def encode_e2m1_quotient(x, step, keep):
    """Codes of x / step, the quotient being rounded to fp32 first; 0 where ``keep`` is False.

    ``step`` and ``keep`` belong to blocks and broadcast against x. One division for each block and
    two fused multiply-adds for each element lead to the codes that a division for each element
    would: x * (1 / step) is corrected by its own remainder, after which no quotient is on the wrong
    side of a tie between two codes (checked for every mantissa of the step and every fp32 next to a
    tie in tests/ops/test_quotients.py). What overflows on the way becomes NaN and so saturates, as
    it has to. A step above 2**126 has a subnormal reciprocal; only a block that holds an infinity
    can have it.
    """
    y = tl.div_rn(1.0, step)
    # x / inf is 0, but 0 * inf would be NaN.
    divisor = tl.where(step == float("inf"), 0.0, step)
    magnitude = tl.abs(x)
    q = magnitude * y
    q = tl.fma(tl.fma(-q, divisor, magnitude), y, q)
    # tl.minimum drops NaN.
    code = e2m1_of_magnitude(tl.minimum(q, tl.where(keep, 6.0, 0.0)))
    # A quotient of at most 2**-150 rounds to zero, which has no sign.
    bound = tl.where(keep, step * -(2.0**-50), float("-inf"))
    return (code | tl.where(x * 2.0**100 < bound, 8, 0)).to(tl.uint8)


@triton.jit
def decode_e2m1(code, DTYPE: tl.constexpr):
    """E2M1 codes (low nibble of uint8, the high one ignored) to fp32, fp16 or bf16, exactly."""
    # As decode_e4m3 does; the multiplier makes up for a bias of 1.
    if DTYPE == tl.float32:
        word = code.to(tl.uint32)
        moved = ((word & 8) << 28) | ((word & 7) << 22)
        value = moved.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126
    elif DTYPE == tl.float16:
        word = code.to(tl.uint16)
        moved = ((word & 8) << 12) | ((word & 7) << 9)
        value = moved.to(tl.float16, bitcast=True) * 16384.0  # 2 ** 14
    else:
        word = code.to(tl.uint16)
        moved = ((word & 8) << 12) | ((word & 7) << 6)
        value = moved.to(tl.bfloat16, bitcast=True) * 8.507059173023462e37
    return value.to(DTYPE)


@triton.jit
def decode_e8m0(exponent, DTYPE: tl.constexpr):
    """Shared exponents (uint8) to 2 ** (u - 127) in fp32 or bf16, exactly; 255 is NaN.

    2 ** -127 is subnormal in both types, and 255 would be infinity: both need one mantissa bit.
    """
    special = (exponent == 0) | (exponent == 255)
    if DTYPE == tl.float32:
        bits = (exponent.to(tl.uint32) << 23) | tl.where(special, 0x400000, 0).to(tl.uint32)
    else:
        bits = (exponent.to(tl.uint16) << 7) | tl.where(special, 0x40, 0).to(tl.uint16)
    return bits.to(DTYPE, bitcast=True)


@triton.jit
def pack_nibbles(codes):
    """Codes [R, K] in low nibbles to bytes [R, K / 2]; the even K index is the low nibble."""
    pairs = tl.reshape(codes, (codes.shape[0], codes.shape[1] // 2, 2))
    low, high = tl.split(pairs)
    return low | (high << 4)


@triton.jit
def unpack_nibbles(packed):
    """Bytes [R, K / 2] to codes [R, K] in low nibbles; inverse of pack_nibbles."""
    return tl.interleave(packed & 0xF, packed >> 4)
