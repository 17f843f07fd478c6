"""One row of x times a weight of E4M3 codes, by fp32 multiply-adds instead of a matrix instruction.

With one row a product waits for its weight. A matrix instruction takes 16 rows, and codes that lie
in the order of its operand; a sum takes neither, and leaves the processors time to read.

A thread takes groups of 16 codes, the 16 bytes of one load, of each of the program's rows, and
decodes them two at a time. The threads' sums are added at the end (gemv_loads.py), in an order that
BLOCK_K fixes (config_limits.config_ok); no row depends on how many others there are. Scales of 16
products or more multiply their sum. One that a program's rows share, or that rows have for
themselves, is loaded in one dimension: what thread has it is then what thread has the group.
"""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.elements import decode_e8m0
from mokernels.ops.kernels.gemv_loads import halves, load_eight, load_fours
from mokernels.ops.kernels.reduce import finish
from mokernels.ops.kernels.tiles import (
    indices,
    row_pointers,
    split_bounds,
    weight_rows,
)

GROUP: tl.constexpr = tl.constexpr(16)  # codes in 16 bytes
SQUARE: tl.constexpr = tl.constexpr(128)  # side of a block with an fp32 scale
SHARED: tl.constexpr = tl.constexpr(32)  # codes that share an exponent
SIGNS: tl.constexpr = tl.constexpr(0x80008000)  # of two fp16 numbers
MAGNITUDES: tl.constexpr = tl.constexpr(0x3F803F80)  # four bits of the exponent, three below it
CODES: tl.constexpr = tl.constexpr(0x7F7F7F7F)  # without their signs; each of these is NaN
ONES: tl.constexpr = tl.constexpr(0x01010101)
MARKS: tl.constexpr = tl.constexpr(0x80808080)

# The four codes of word $4. LLVM would pair conversions of other words first.
DECODE_FOUR: tl.constexpr = tl.constexpr(
    """{
    .reg .b16 low, high, first, second;
    .reg .b32 pair;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 pair, low;
    mov.b32 {first, second}, pair;
    cvt.f32.f16 $0, first;
    cvt.f32.f16 $1, second;
    cvt.rn.f16x2.e4m3x2 pair, high;
    mov.b32 {first, second}, pair;
    cvt.f32.f16 $2, first;
    cvt.f32.f16 $3, second;
    }"""
)


@triton.jit
def decode_four(words, CONVERTS: tl.constexpr):
    """The 4 codes of uint32 words, in the order of K, in fp32; exact.

    Without CONVERTS they are code * 2 ** -8, their bits being moved to the places of an fp16 number
    (see elements.decode_e4m3), and NaN codes are +-480 * 2 ** -8: :func:`keep_nan` is for these.
    """
    if CONVERTS:
        w_0, w_1, w_2, w_3 = tl.inline_asm_elementwise(
            DECODE_FOUR,
            "=f,=f,=f,=f,r",
            [words],
            (tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        w_0, w_2 = halves(((words << 7) & MAGNITUDES) | ((words << 8) & SIGNS), tl.float16)
        w_1, w_3 = halves(((words >> 1) & MAGNITUDES) | (words & SIGNS), tl.float16)
    return w_0, w_1, w_2, w_3


@triton.jit
def keep_nan(total, words_0, words_1, words_2, words_3):
    """The sums [N, G], NaN where any code of four words is.

    One more than the magnitude of a NaN code, and of no other, has the bit of the sign.
    """
    marks = ((words_0 & CODES) + ONES) | ((words_1 & CODES) + ONES)
    marks |= ((words_2 & CODES) + ONES) | ((words_3 & CODES) + ONES)
    return tl.where((marks & MARKS) != 0, float("nan"), total)


@triton.jit
def add_products(
    total,
    first,
    second,
    row,
    k,
    K,
    EIGHT: tl.constexpr,
    DTYPE: tl.constexpr,
    CONVERTS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Fp32 total [N, G] plus the 8 codes of two words [N, G] by x, one after the other.

    The multiply-adds are written out: which product and sum a compiler joins is its own choice.
    """
    x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7 = load_eight(
        row, k, K, GROUP, EIGHT, total.shape[1], DTYPE, EVEN_K
    )
    w_0, w_1, w_2, w_3 = decode_four(first, CONVERTS)
    w_4, w_5, w_6, w_7 = decode_four(second, CONVERTS)
    total = tl.fma(w_0, x_0, total)
    total = tl.fma(w_1, x_1, total)
    total = tl.fma(w_2, x_2, total)
    total = tl.fma(w_3, x_3, total)
    total = tl.fma(w_4, x_4, total)
    total = tl.fma(w_5, x_5, total)
    total = tl.fma(w_6, x_6, total)
    return tl.fma(w_7, x_7, total)


@triton.jit
def add_step(
    total,
    w_rows,
    row,
    k,
    K,
    DTYPE: tl.constexpr,
    CONVERTS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Fp32 total [N, G] plus the products of one step along K."""
    fours = load_fours(w_rows, k, K, GROUP, 4, 0, total.shape[1], EVEN_K)
    words_0 = fours[0].to(tl.uint32, bitcast=True)
    words_1 = fours[1].to(tl.uint32, bitcast=True)
    words_2 = fours[2].to(tl.uint32, bitcast=True)
    words_3 = fours[3].to(tl.uint32, bitcast=True)
    total = add_products(total, words_0, words_1, row, k, K, 0, DTYPE, CONVERTS, EVEN_K)
    total = add_products(total, words_2, words_3, row, k, K, 1, DTYPE, CONVERTS, EVEN_K)
    if not CONVERTS:
        total = keep_nan(total, words_0, words_1, words_2, words_3)
    return total


@triton.jit
def load_scales(
    block_scale,
    tile,
    N,
    stride,
    k,
    K,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Fp32 scales of the groups of a step: [1, G] of square blocks, or [N, G] of exponents.

    0 or 2 ** -127 beyond K.
    """
    if block_scale.dtype.element_ty == tl.uint8:
        item = tl.arange(0, BLOCK_N * GROUPS)
        group = item % GROUPS
        row = tl.minimum(tile * BLOCK_N + item // GROUPS, N - 1)
        pointers = block_scale + row.to(tl.int64) * stride + (k // SHARED + group * GROUP // SHARED)
    else:
        group = tl.arange(0, GROUPS)
        row = tile * BLOCK_N // SQUARE
        pointers = block_scale + row.to(tl.int64) * stride + (k // SQUARE + group * GROUP // SQUARE)
    if EVEN_K:
        scales = tl.load(pointers)
    else:
        scales = tl.load(pointers, mask=k + group * GROUP < K, other=0)
    if block_scale.dtype.element_ty == tl.uint8:
        scales = tl.reshape(decode_e8m0(scales, tl.float32), (BLOCK_N, GROUPS))
    else:
        scales = scales[None, :]
    return scales


@triton.jit(do_not_specialize=["M", "N", "stride_block_scale", "blocks_per_split"])
def gemv_e4m3(
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
    CONVERTS: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Out [1, N] = (x [1, K] @ decode(w, block_scale) [N, K].T) * scale_w [N] + bias [N].

    K is a multiple of 16. x is int32 words of two numbers of DTYPE, bf16 or fp16; w int32 words
    [N, K / 4] of the checkpoint's bytes; block_scale fp32 [ceil(N / 128), ceil(K / 128)], of which
    a tile has one row, or exponents uint8 [N, K / 32], or None. ``stride_w`` counts 16 bytes, so
    that the compiler knows that rows are aligned to them. M is 1, scale_x None and scale_w fp32 or
    None. CONVERTS is for targets with an instruction from two codes to two fp16 numbers.
    A sum of 16 products passes through fp32 before its scale.
    Where SPLIT says that programs share K, ``out`` is as :func:`finish` takes it.
    """
    wait_for_inputs()
    tile = tl.program_id(0)
    rm = tl.arange(0, 1)
    rn = indices(tile, BLOCK_N)
    row = row_pointers(x, rm, 0)
    w_rows = weight_rows(w, rn, N, stride_w * 4)
    start, stop = split_bounds(tl.program_id(1), K, blocks_per_split, BLOCK_K)
    GROUPS: tl.constexpr = BLOCK_K // GROUP
    acc = tl.zeros((BLOCK_N, GROUPS), tl.float32)
    for k in range(start, stop, BLOCK_K):
        if block_scale is None:
            acc = add_step(acc, w_rows, row, k, K, DTYPE, CONVERTS, EVEN_K)
        else:
            scales = load_scales(
                block_scale, tile, N, stride_block_scale, k, K, BLOCK_N, GROUPS, EVEN_K
            )
            total = add_step(tl.zeros_like(acc), w_rows, row, k, K, DTYPE, CONVERTS, EVEN_K)
            acc = tl.fma(total, tl.broadcast_to(scales, (BLOCK_N, GROUPS)), acc)
    sums = tl.sum(acc, axis=1)
    if not CONVERTS:
        sums *= 256.0
    finish(sums[None, :], rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, SPLIT)
