"""What GEMVs load of one row of x and of a weight: neighbours, each in the thread that adds them.

A thread takes a group of neighbours in K, the 16 bytes of one load of each of the program's rows.
Everything that depends on a column has the shape [rows, groups], one group for each thread: nothing
passes through shared memory until the threads' sums are added at the end.
"""

import triton
import triton.language as tl


@triton.jit
def halves(words, DTYPE: tl.constexpr):
    """Fp32 values of the two bf16 or fp16 numbers in uint32 words, the low half first."""
    if DTYPE == tl.bfloat16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def load_fours(
    rows,
    k,
    K,
    GROUP: tl.constexpr,
    ITEMS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Four neighbours of the ITEMS of each group, from OFFSET on, as four [R, G]; 0 beyond K.

    They are 16 bytes, of one thread: it takes no exchange to part them. ``k`` is the element that
    the first of the groups of GROUP elements begins with. Two dimensions, one of them with the
    neighbours, leave the compiler no choice of a layout.
    """
    item = tl.arange(0, 4 * GROUPS)
    pointers = rows + (k // GROUP * ITEMS + OFFSET + item // 4 * ITEMS + item % 4)[None, :]
    if EVEN_K:
        fours = tl.load(pointers)
    else:
        fours = tl.load(pointers, mask=(k + item // 4 * GROUP < K)[None, :], other=0)
    even, odd = tl.split(tl.reshape(fours, (fours.shape[0], GROUPS, 2, 2)))
    item_0, item_2 = tl.split(even)
    item_1, item_3 = tl.split(odd)
    return item_0, item_1, item_2, item_3


@triton.jit
def load_eight(
    row,
    k,
    K,
    GROUP: tl.constexpr,
    EIGHT: tl.constexpr,
    GROUPS: tl.constexpr,
    DTYPE: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Fp32 [1, G] items 0 to 7 of the eight number EIGHT of each group of x."""
    if DTYPE == tl.float32:
        x_0, x_1, x_2, x_3 = load_fours(row, k, K, GROUP, GROUP, 8 * EIGHT, GROUPS, EVEN_K)
        x_4, x_5, x_6, x_7 = load_fours(row, k, K, GROUP, GROUP, 8 * EIGHT + 4, GROUPS, EVEN_K)
    else:
        pairs = load_fours(row, k, K, GROUP, GROUP // 2, 4 * EIGHT, GROUPS, EVEN_K)
        x_0, x_1 = halves(pairs[0].to(tl.uint32, bitcast=True), DTYPE)
        x_2, x_3 = halves(pairs[1].to(tl.uint32, bitcast=True), DTYPE)
        x_4, x_5 = halves(pairs[2].to(tl.uint32, bitcast=True), DTYPE)
        x_6, x_7 = halves(pairs[3].to(tl.uint32, bitcast=True), DTYPE)
    return x_0, x_1, x_2, x_3, x_4, x_5, x_6, x_7
