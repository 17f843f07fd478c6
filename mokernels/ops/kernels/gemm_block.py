"""FP8 with scales per 128 of K: each K block's products are scaled on the fp32 accumulator."""

import triton
import triton.language as tl

from mokernels.ops.kernels.tiles import (
    as_operand,
    by_rows,
    indices,
    load_activations,
    load_weights,
    multiply,
    new_accumulator,
    row_pointers,
    split_bounds,
    store_output,
    store_partial,
    tile_of_program,
    weight_rows,
)


@triton.jit
def block_factor(
    scale_x,
    x_offsets,
    in_m,
    stride_x_block,
    scale_w,
    w_offset,
    stride_w_block,
    block,
    SWAP: tl.constexpr,
):
    """What multiplies the products of K block ``block``, broadcastable against the accumulator.

    A scale that is None has no blocks; one of the two has.
    """
    if scale_x is None:
        factor = tl.load(scale_w + w_offset + block * stride_w_block)
    else:
        rows = tl.load(scale_x + x_offsets + block * stride_x_block, mask=in_m, other=0.0)
        if scale_w is not None:
            rows = rows * tl.load(scale_w + w_offset + block * stride_w_block)
        if SWAP:
            factor = rows[None, :]
        else:
            factor = rows[:, None]
    return factor


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def gemm_block(
    x,
    w,
    block_scale_x,
    block_scale_w,
    scale_x,
    scale_w,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_bx,
    stride_bx_block,
    stride_bw,
    stride_bw_block,
    stride_sx,
    stride_sw,
    blocks_per_split,
    COMPUTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The product of FP8 codes with block scales, ended as in gemm_epilogue.

    The sum over k is of x[m, k] * w[n, k] * bx[m, k // 128] * bw[n // 128, k // 128]; bx and bw are
    ``block_scale_x`` and ``block_scale_w``. One of them may be None (1), and its operand may have a
    scale of the finished sum instead. BLOCK_K and BLOCK_N divide 128, so that a step along K meets
    one scale for each row of x, and one for the tile's weights. The sum over steps is in fp32,
    whatever the hardware does inside one.
    With SPLIT, ``out`` is the fp32 workspace of partial sums [splits, M, N].
    """
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rm = indices(tile_m, BLOCK_M)
    rn = indices(tile_n, BLOCK_N)
    x_rows = row_pointers(x, rm, stride_x)
    w_rows = weight_rows(w, rn, N, stride_w)
    bx_offsets = rm.to(tl.int64) * stride_bx
    bw_offset = tile_n * BLOCK_N // 128 * stride_bw
    start, stop = split_bounds(K, blocks_per_split, BLOCK_K)
    acc = new_accumulator(BLOCK_M, BLOCK_N, SWAP)
    for k in range(start, stop, BLOCK_K):
        x_tile = as_operand(load_activations(x_rows, rm < M, k, BLOCK_K, K, EVEN_K), COMPUTE)
        w_tile = as_operand(load_weights(w_rows, k, BLOCK_K, K, EVEN_K), COMPUTE)
        factor = block_factor(
            block_scale_x,
            bx_offsets,
            rm < M,
            stride_bx_block,
            block_scale_w,
            bw_offset,
            stride_bw_block,
            k // 128,
            SWAP,
        )
        zeros = new_accumulator(BLOCK_M, BLOCK_N, SWAP)
        acc += multiply(x_tile, w_tile, zeros, SWAP, None) * factor
    acc = by_rows(acc, SWAP)
    if SPLIT:
        store_partial(acc, rm, rn, M, N, out)
    else:
        store_output(acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out)
