"""Products of many rows: operands come by TMA, to programs that stay for several tiles.

FP8 by FP8 as it is stored, 16-bit activations by a weight that a launch before has decoded, and
NVFP4 and MXFP8 where the matrix unit copies their block scales itself.
"""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.gemm_block import add_block
from mokernels.ops.kernels.gemm_native import load_in_order, multiply_scaled, scales_in_order
from mokernels.ops.kernels.reduce import finish
from mokernels.ops.kernels.tiles import (
    indices,
    multiply,
    new_accumulator,
    split_bounds,
    store_output,
    tile_at,
)


@triton.jit
def sum_of_tile(
    x,
    w,
    bx_rows,
    block_scale_w,
    row,
    column,
    in_m,
    start,
    stop,
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The accumulator of the tile whose first element is [row, column], over [start, stop) of K.

    ``x`` and ``w`` are descriptors, which read 0 past the ends of rows and columns.
    ``bx_rows`` and ``block_scale_w`` point to the first scales of the tile's rows and of its
    weights, or are None.
    """
    acc = new_accumulator(BLOCK_M, BLOCK_N, False)
    for k in range(start, stop, BLOCK_K):
        x_tile = x.load([row, k])
        w_tile = w.load([column, k])
        if bx_rows is None and block_scale_w is None:
            acc = multiply(x_tile, w_tile, acc, False, PROMOTE)
        else:
            bx, bw = None, block_scale_w
            if block_scale_w is not None:
                bw += k // 128
            if bx_rows is not None:
                bx = tl.load(bx_rows + k // 128, mask=in_m, other=0.0)
            acc = add_block(acc, x_tile, w_tile, bx, bw, False, BLOCK_M, BLOCK_N)
    return acc


@triton.jit
def scaled_sum_of_tile(
    x,
    w,
    block_scale_x,
    block_scale_w,
    tile_m,
    tile_n,
    M,
    N,
    K,
    start,
    stop,
    stride_bx,
    stride_bw,
    ELEMENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same of operands whose block scales the matrix unit applies; see gemm_native."""
    PACKED: tl.constexpr = 2 if ELEMENT == "e2m1" else 1
    GROUP: tl.constexpr = 16 if ELEMENT == "e2m1" else 32
    COLUMNS: tl.constexpr = BLOCK_K // GROUP
    bx, bx_inside = scales_in_order(block_scale_x, tile_m, M, stride_bx, BLOCK_M, COLUMNS)
    bw, bw_inside = scales_in_order(block_scale_w, tile_n, N, stride_bw, BLOCK_N, COLUMNS)
    acc = new_accumulator(BLOCK_M, BLOCK_N, False)
    for k in range(start, stop, BLOCK_K):
        x_tile = x.load([tile_m * BLOCK_M, k // PACKED])
        w_tile = w.load([tile_n * BLOCK_N, k // PACKED])
        group, groups = k // GROUP, K // GROUP
        x_scales = load_in_order(bx, bx_inside, group, groups, BLOCK_M, COLUMNS, EVEN_K)
        w_scales = load_in_order(bw, bw_inside, group, groups, BLOCK_N, COLUMNS, EVEN_K)
        acc = multiply_scaled(x_tile, x_scales, w_tile, w_scales, acc, ELEMENT, False)
    return acc


@triton.jit
def store_by_halves(
    acc,
    rm,
    tile_n,
    M,
    N,
    scale_x,
    stride_sx,
    scale_w,
    stride_sw,
    bias,
    out,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """store_output of a tile's left columns, then of its right ones.

    A whole tile's addresses have no registers beside its sums.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = acc.reshape(BLOCK_M, 2, HALF).trans(0, 2, 1).split()
    rn = tile_n * BLOCK_N + tl.arange(0, HALF)
    store_output(left, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, stride_out)
    rn += HALF
    store_output(right, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, stride_out)


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def gemm_persistent(
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
    stride_bx,
    stride_bw,
    stride_sx,
    stride_sw,
    stride_out,
    blocks_per_split,
    PROGRAMS: tl.constexpr,
    ELEMENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """The products of gemm_epilogue, gemm_block and gemm_native, to the same bits.

    ``x`` and ``w`` are TMA descriptors of [M, K] and [N, K], with blocks [BLOCK_M, BLOCK_K] and
    [BLOCK_N, BLOCK_K]: E4M3, or without block scales both bf16 or both fp16. With an ELEMENT they
    are what gemm_native takes, packed where it is "e2m1", in blocks of BLOCK_K elements.
    The rows of ``out`` [M, N] are dense and ``stride_out`` items apart, so that it may be columns
    of a wider result. Where SPLIT says that programs share K, they are N items apart, and ``out``
    is as :func:`finish` takes it.

    At most PROGRAMS programs take the tiles in turns, in the order in which programs of one tile
    each would start. Flattened, the loops over tiles and over K are one, so that the next tile's
    operands are under way while this tile ends.
    """
    wait_for_inputs()
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=SPLIT is None):
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        rm = indices(tile_m, BLOCK_M)
        start, stop = 0, K
        if SPLIT is not None:
            start, stop = split_bounds(tl.program_id(1), K, blocks_per_split, BLOCK_K)
        if ELEMENT is None:
            bx_rows, bw = None, None
            if block_scale_x is not None:
                bx_rows = block_scale_x + rm.to(tl.int64) * stride_bx
            if block_scale_w is not None:
                bw = block_scale_w + tile_n * BLOCK_N // 128 * stride_bw
            acc = sum_of_tile(
                x, w, bx_rows, bw, tile_m * BLOCK_M, tile_n * BLOCK_N, rm < M, start, stop,
                PROMOTE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            acc = scaled_sum_of_tile(
                x, w, block_scale_x, block_scale_w, tile_m, tile_n, M, N, K, start, stop,
                stride_bx, stride_bw, ELEMENT, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if SPLIT is None:
            store_by_halves(
                acc, rm, tile_n, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out,
                stride_out, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            rn = indices(tile_n, BLOCK_N)
            finish(
                acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, SPLIT, tile
            )
