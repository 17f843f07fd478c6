"""The end of a split-K product: add the parts in their order, then scale, add the bias, cast."""

import triton
import triton.language as tl

from mokernels.ops.kernels.tiles import indices, row_pointers, store_output


@triton.jit(do_not_specialize=["M"])
def reduce_splits(
    partials,
    scale_x,
    scale_w,
    bias,
    out,
    M,
    N,
    stride_sx,
    stride_sw,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store out [M, N] = (partials[0] + partials[1] + ...) * scale_x [M] * scale_w [N] + bias [N].

    ``partials`` is fp32 [SPLITS, M, N]. They are added from the first to the last, whatever the
    tile, so that the result depends on nothing but their number. The loop is unrolled: a program
    has all its loads in flight before it adds.
    """
    rm = indices(tl.program_id(0), BLOCK_M)
    rn = indices(tl.program_id(1), BLOCK_N)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    pointers = row_pointers(partials, rm, N) + rn[None, :]
    part = tl.cast(M, tl.int64) * N
    acc = tl.load(pointers, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(pointers + split * part, mask=inside, other=0.0)
    store_output(acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out)
