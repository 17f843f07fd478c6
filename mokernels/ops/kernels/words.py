"""NVFP4 weights by words of 8 codes, decoded to where the matrix instruction wants them.

In a matrix instruction's operand four threads share a row, and each holds pairs of numbers in one
register. Neighbouring codes are 4 bits apart and would have to be moved there one by one. But the
order of K is free as long as x and the weight agree. So a register takes codes j and j + 4 of a
word, which are 16 bits apart: both are moved, and then scaled, by one instruction. And a thread
takes up to 4 neighbouring words, the 16 bytes of one load: no code changes the thread that loads
it, and nothing decoded passes through shared memory, unless the instruction reads it from there.

A step of K is thus counted in spans of 4 threads by W words by 8 codes. x is read in the order
[spans, words, threads, codes]: whole groups of 8 move, so that loads stay wide, and those that
four threads read at once are neighbours in shared memory, or they would want the same banks. Then
:func:`paired` brings the codes of a word, and with RUN = 2 the threads too, into their places.

RUN is the number of neighbours in K that a thread holds in the operand: wgmma, with the weight in
registers, has 2; for mma.sync Triton chooses 8, since that is what one loaded word becomes.
"""

import triton
import triton.language as tl

from mokernels.ops.kernels.tiles import as_operand

THREADS: tl.constexpr = tl.constexpr(4)  # that share a row of the operand
MOST_WORDS: tl.constexpr = tl.constexpr(4)  # in the 16 bytes of a load

# Pairs of codes as bf16: signs at bit 15, magnitudes at bits 8 to 6, for which masked codes are
# multiplied by the sum of two powers of two, one for each, and masked again. $0 to $3 are pairs
# j and j + 4, $4 is the word, $5 the factor twice; lop3 with 0xea is (a & b) | c. A sum with -0 is
# what a product is before sm_90.
BF16_PAIRS: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 part, high, zero;
    mov.b32 zero, 0x80008000;
    and.b32 part, $4, 0x000f000f;
    mul.lo.u32 part, part, 0x1040;
    and.b32 part, part, 0x81c081c0;
    fma.rn.bf16x2 $0, part, $5, zero;
    and.b32 part, $4, 0x00f000f0;
    mul.lo.u32 part, part, 0x104;
    and.b32 part, part, 0x81c081c0;
    fma.rn.bf16x2 $1, part, $5, zero;
    shr.u32 high, $4, 6;
    and.b32 part, high, 0x003c003c;
    mul.lo.u32 part, part, 0x410;
    and.b32 part, part, 0x81c081c0;
    fma.rn.bf16x2 $2, part, $5, zero;
    and.b32 part, $4, 0x80008000;
    lop3.b32 part, high, 0x01c001c0, part, 0xea;
    fma.rn.bf16x2 $3, part, $5, zero;
    }"""
)
# As fp16: signs at bit 15, magnitudes at bits 11 to 9, all in the high byte. Codes of even j are
# moved at once, and those of odd j, to the bytes of a word; prmt parts those.
FP16_PAIRS: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 even, odd, part, zero;
    mov.b32 zero, 0x80008000;
    shl.b32 even, $4, 4;
    and.b32 even, even, 0x80808080;
    shl.b32 part, $4, 1;
    lop3.b32 even, part, 0x0e0e0e0e, even, 0xea;
    and.b32 odd, $4, 0x80808080;
    shr.u32 part, $4, 3;
    lop3.b32 odd, part, 0x0e0e0e0e, odd, 0xea;
    prmt.b32 part, even, 0, 0x2404;
    fma.rn.f16x2 $0, part, $5, zero;
    prmt.b32 part, odd, 0, 0x2404;
    fma.rn.f16x2 $1, part, $5, zero;
    and.b32 part, even, 0xff00ff00;
    fma.rn.f16x2 $2, part, $5, zero;
    and.b32 part, odd, 0xff00ff00;
    fma.rn.f16x2 $3, part, $5, zero;
    }"""
)
BF16_TWICE: tl.constexpr = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")
FP16_TWICE: tl.constexpr = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")


@triton.jit
def word_columns(BLOCK_K: tl.constexpr):
    """Columns [BLOCK_K] of x in the order [spans, words, threads, codes]."""
    WORDS: tl.constexpr = min(MOST_WORDS, BLOCK_K // (8 * THREADS))
    SPAN: tl.constexpr = 8 * THREADS * WORDS
    k = tl.arange(0, BLOCK_K)
    word = k // (8 * THREADS) % WORDS
    thread = k // 8 % THREADS
    return k // SPAN * SPAN + (thread * WORDS + word) * 8 + k % 8


@triton.jit
def by_words(x):
    """X [M, K] in the order of K as :func:`word_columns` orders it."""
    WORDS: tl.constexpr = min(MOST_WORDS, x.shape[1] // (8 * THREADS))
    SPANS: tl.constexpr = x.shape[1] // (8 * THREADS * WORDS)
    x = tl.reshape(x, (x.shape[0], SPANS, THREADS, WORDS, 8))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), (x.shape[0], SPANS * THREADS * WORDS * 8))


@triton.jit
def paired(x, RUN: tl.constexpr):
    """X [M, K] as :func:`word_columns` orders it, in the order of :func:`decode_words`."""
    K: tl.constexpr = x.shape[1]
    x = tl.reshape(x, (x.shape[0], K // (8 * THREADS), THREADS, 2, 4))
    if RUN == 2:
        x = tl.permute(x, (0, 1, 4, 2, 3))
    else:
        x = tl.permute(x, (0, 1, 2, 4, 3))
    return tl.reshape(x, (x.shape[0], K))


@triton.jit
def decode_words(words, scale, DTYPE: tl.constexpr, RUN: tl.constexpr):
    """Words [N, K / 8] and E4M3 scales [N, K / 16] to code * scale * 2 ** -8 (fp16) or 2 ** -9.

    As :func:`mokernels.ops.kernels.gemm_decode.decode_nvfp4` does, to the bit, but for the order of
    K. DTYPE is fp16 or bf16. With RUN = 8 a word's pairs are neighbours, and the threads of a span
    come after it; with RUN = 2 threads come between the pairs.
    """
    ROWS: tl.constexpr = words.shape[0]
    COUNT: tl.constexpr = words.shape[1]
    WORDS: tl.constexpr = min(MOST_WORDS, COUNT // THREADS)
    scale = as_operand(scale, tl.float32)
    TWICE: tl.constexpr = FP16_TWICE if DTYPE == tl.float16 else BF16_TWICE
    PAIRS: tl.constexpr = FP16_PAIRS if DTYPE == tl.float16 else BF16_PAIRS
    scale *= 64.0 if DTYPE == tl.float16 else 1.661534994731145e35  # 2 ** 117
    factor = tl.inline_asm_elementwise(TWICE, "=r,f", [scale], tl.int32, is_pure=True, pack=1)
    factor = tl.broadcast_to(factor[:, :, None], (ROWS, COUNT // 2, 2))
    pair_0, pair_1, pair_2, pair_3 = tl.inline_asm_elementwise(
        PAIRS,
        "=&r,=&r,=&r,=&r,r,r",
        [words, tl.reshape(factor, (ROWS, COUNT))],
        (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )
    pairs = tl.join(tl.join(pair_0, pair_2), tl.join(pair_1, pair_3))
    low = pairs.to(tl.uint16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    values = tl.join(low, high)  # [N, K / 8, 2, 2, 2], pair 2 a + b at [a, b]
    values = tl.reshape(values, (ROWS, COUNT // (THREADS * WORDS), THREADS, WORDS * 8 // RUN, RUN))
    return tl.reshape(tl.permute(values, (0, 1, 3, 2, 4)), (ROWS, COUNT * 8))
