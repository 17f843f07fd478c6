"""One row of x times an NVFP4 weight, by fp32 multiply-adds instead of a matrix instruction.

With one row a product waits for its weight, unless it decodes slower than memory delivers: 4 bits a
weight are so few that the integer instructions for each decide. A matrix instruction wants codes
that are neighbours in K side by side in a register, which takes most of them; a sum does not care.

A thread takes groups of 32 weights, the 16 bytes of one load, of each of the program's rows. Code j
of the 8 in a word lies in bits 4 j to 4 j + 3: those of even j are moved at once, and those of odd
j. The threads' sums are added at the end (gemv_loads.py). The order of that addition is fixed by
the number of threads, which BLOCK_K fixes in turn (config_limits.config_ok); no row depends on how
many others there are.
"""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.elements import decode_e4m3
from mokernels.ops.kernels.gemv_loads import halves, load_eight, load_fours
from mokernels.ops.kernels.reduce import finish
from mokernels.ops.kernels.tiles import (
    indices,
    row_pointers,
    split_bounds,
    weight_rows,
)

GROUP: tl.constexpr = tl.constexpr(32)  # weights in 16 bytes, two blocks of one scale each
SIGNS: tl.constexpr = tl.constexpr(0x80808080)  # of four fp16 numbers by their high bytes
MAGNITUDES: tl.constexpr = tl.constexpr(0x0E0E0E0E)  # two bits of the exponent, one below it
HIGH_BYTES: tl.constexpr = tl.constexpr(0xFF00FF00)  # of a word's halves
UNBIAS: tl.constexpr = tl.constexpr(2.0**14)

# What decode_word does, in one instruction instead of two where bytes are moved and a zero put
# beside each (prmt), and with each half converted where it is: LLVM would pair those of other words
# first. $0 to $7 are the codes' values, $8 is the word; lop3 with 0xea is (a & b) | c.
DECODE_WORD: tl.constexpr = tl.constexpr(
    """{
    .reg .b32 even, odd, part, pair;
    .reg .b16 low, high;
    shl.b32 even, $8, 4;
    and.b32 even, even, 0x80808080;
    shl.b32 part, $8, 1;
    lop3.b32 even, part, 0x0e0e0e0e, even, 0xea;
    and.b32 odd, $8, 0x80808080;
    shr.u32 part, $8, 3;
    lop3.b32 odd, part, 0x0e0e0e0e, odd, 0xea;
    prmt.b32 pair, even, 0, 0x2404;
    mov.b32 {low, high}, pair;
    cvt.f32.f16 $0, low;
    cvt.f32.f16 $4, high;
    prmt.b32 pair, odd, 0, 0x2404;
    mov.b32 {low, high}, pair;
    cvt.f32.f16 $1, low;
    cvt.f32.f16 $5, high;
    and.b32 pair, even, 0xff00ff00;
    mov.b32 {low, high}, pair;
    cvt.f32.f16 $2, low;
    cvt.f32.f16 $6, high;
    and.b32 pair, odd, 0xff00ff00;
    mov.b32 {low, high}, pair;
    cvt.f32.f16 $3, low;
    cvt.f32.f16 $7, high;
    }"""
)


@triton.jit
def decode_word(words, PTX: tl.constexpr):
    """The 8 codes of uint32 words, in the order of K, as fp32 code * 2 ** -14; exact.

    A code's sign and magnitude at bit 15 and bits 11 to 9 of an fp16 number make that value, the
    subnormal code 0.5 included. All of these bits are in the number's high byte: codes 0, 2, 4, 6
    of a word become the four bytes of one word, the others those of another, and then pairs of
    bytes that are 16 bits apart the numbers.
    """
    if PTX:
        w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7 = tl.inline_asm_elementwise(
            DECODE_WORD,
            "=f,=f,=f,=f,=f,=f,=f,=f,r",
            [words],
            (
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
                tl.float32,
            ),
            is_pure=True,
            pack=1,
        )
    else:
        even = ((words << 1) & MAGNITUDES) | ((words << 4) & SIGNS)
        odd = ((words >> 3) & MAGNITUDES) | (words & SIGNS)
        w_0, w_4 = halves((even << 8) & HIGH_BYTES, tl.float16)
        w_1, w_5 = halves((odd << 8) & HIGH_BYTES, tl.float16)
        w_2, w_6 = halves(even & HIGH_BYTES, tl.float16)
        w_3, w_7 = halves(odd & HIGH_BYTES, tl.float16)
    return w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7


@triton.jit
def add_products(
    total,
    words,
    row,
    k,
    K,
    EIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Fp32 total [N, G] plus the 8 codes of each word [N, G] by x, one after the other.

    The multiply-adds are written out: which product and sum a compiler joins is its own choice.
    """
    GROUPS: tl.constexpr = total.shape[1]
    x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7 = load_eight(
        row, k, K, GROUP, EIGHT, GROUPS, DTYPE, EVEN_K
    )
    words = words.to(tl.uint32, bitcast=True)
    w_0, w_1, w_2, w_3, w_4, w_5, w_6, w_7 = decode_word(words, PTX)
    total = tl.fma(w_0, x_0, total)
    total = tl.fma(w_1, x_1, total)
    total = tl.fma(w_2, x_2, total)
    total = tl.fma(w_3, x_3, total)
    total = tl.fma(w_4, x_4, total)
    total = tl.fma(w_5, x_5, total)
    total = tl.fma(w_6, x_6, total)
    return tl.fma(w_7, x_7, total)


@triton.jit
def load_scales(rows, k, K, GROUPS: tl.constexpr, HAS_TYPE: tl.constexpr, EVEN_K: tl.constexpr):
    """Fp32 scales of the first and of the second block of each group, two [N, G]; 0 beyond K.

    ``rows`` point to pairs of E4M3 codes in int16, of which nothing tells the compiler that more
    than one is aligned: a thread that loaded several would have others' groups.
    """
    group = tl.arange(0, GROUPS)
    pointers = rows + (k // GROUP + group)[None, :]
    if EVEN_K:
        pairs = tl.load(pointers)
    else:
        pairs = tl.load(pointers, mask=(k + group * GROUP < K)[None, :], other=0)
    first = decode_e4m3((pairs & 0xFF).to(tl.uint8), tl.float32, HAS_TYPE)
    second = decode_e4m3(((pairs >> 8) & 0xFF).to(tl.uint8), tl.float32, HAS_TYPE)
    return first, second


@triton.jit(do_not_specialize=["M", "N", "stride_block_scale", "blocks_per_split"])
def gemv_nvfp4(
    x,
    w,
    block_scale,
    scale_x,
    scale_w,
    bias,
    out,
    M,
    N,
    K,
    stride_w,
    stride_block_scale,
    stride_sx,
    stride_sw,
    blocks_per_split,
    DTYPE: tl.constexpr,
    HAS_TYPE: tl.constexpr,
    PTX: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Out [1, N] = (x [1, K] @ decode(w, block_scale) [N, K].T) * scale_x * scale_w + bias [N].

    K is a multiple of 32. x is fp32, or int32 words of two numbers of DTYPE, bf16 or fp16; w int32
    words [N, K / 8] of the checkpoint's bytes; block_scale int16 [N, K / 32], two E4M3 codes each.
    ``stride_w`` counts 16 bytes, so that the compiler knows that rows are aligned to them. M is 1,
    and scale_x one fp32 number or None. HAS_TYPE is the target's has_fp8_type; PTX is for NVIDIA.
    Where SPLIT says that programs share K, ``out`` is as :func:`finish` takes it.
    """
    wait_for_inputs()
    rm = tl.arange(0, 1)
    rn = indices(tl.program_id(0), BLOCK_N)
    row = row_pointers(x, rm, 0)
    w_rows = weight_rows(w, rn, N, stride_w * 4)
    s_rows = weight_rows(block_scale, rn, N, stride_block_scale)
    start, stop = split_bounds(tl.program_id(1), K, blocks_per_split, BLOCK_K)
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    acc = tl.zeros((BLOCK_N, GROUPS), tl.float32)
    for k in range(start, stop, BLOCK_K):
        words_0, words_1, words_2, words_3 = load_fours(w_rows, k, K, GROUP, 4, 0, GROUPS, EVEN_K)
        scale_0, scale_1 = load_scales(s_rows, k, K, GROUPS, HAS_TYPE, EVEN_K)
        total = tl.zeros_like(acc)
        total = add_products(total, words_0, row, k, K, 0, DTYPE, PTX, EVEN_K)
        total = add_products(total, words_1, row, k, K, 1, DTYPE, PTX, EVEN_K)
        acc = tl.fma(total, scale_0, acc)
        total = tl.zeros_like(acc)
        total = add_products(total, words_2, row, k, K, 2, DTYPE, PTX, EVEN_K)
        total = add_products(total, words_3, row, k, K, 3, DTYPE, PTX, EVEN_K)
        acc = tl.fma(total, scale_1, acc)
    sums = (tl.sum(acc, axis=1) * UNBIAS)[None, :]
    finish(sums, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, SPLIT)
