"""NVFP4 x NVFP4 and MXFP8 x MXFP8 on matrix units that apply the block scales themselves."""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.reduce import finish
from mokernels.ops.kernels.tiles import (
    by_rows,
    indices,
    load_activations,
    load_weights,
    new_accumulator,
    no_parts,
    number_of_parts,
    row_pointers,
    split_bounds,
    tile_of_program,
    weight_rows,
)


@triton.jit
def multiply_scaled(x, scale_x, w, scale_w, acc, ELEMENT: tl.constexpr, SWAP: tl.constexpr):
    """Acc + x @ w.T, each operand times its block scales."""
    if SWAP:
        acc = tl.dot_scaled(w, scale_w, ELEMENT, tl.trans(x), scale_x, ELEMENT, acc)
    else:
        acc = tl.dot_scaled(x, scale_x, ELEMENT, tl.trans(w), scale_w, ELEMENT, acc)
    return acc


@triton.jit
def scales_in_order(scales, tile, count, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers [ROWS / 128, 128 * COLUMNS] to a tile's first block scales, and which rows exist.

    They follow one another as tcgen05 copies scales from shared to tensor memory: four of a row;
    these of the rows 32, 64 and 96 further on; the same of the next of 32 rows; the next four.
    ``stride`` is that of a row of ``scales`` [count, .], the checkpoint's own.
    """
    place = tl.arange(0, 128 * COLUMNS)[None, :]
    block = tl.arange(0, ROWS // 128)[:, None]
    row = tile * ROWS + block * 128 + place // 4 % 4 * 32 + place // 16 % 32
    return scales + (row.to(tl.int64) * stride + (place // 512 * 4 + place % 4)), row < count


@triton.jit
def load_in_order(
    pointers,
    inside,
    column,
    limit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """[ROWS, COLUMNS] block scales from ``column`` on; 0 past the last row and past ``limit``.

    Triton leaves what it finds reshaped like this in shared memory, for the matrix unit to copy;
    other scales it takes through registers.
    """
    if not EVEN_K:
        place = tl.arange(0, 128 * COLUMNS)[None, :]
        inside &= column + place // 512 * 4 + place % 4 < limit
    read = tl.load(pointers + column, mask=inside, other=0.0)
    read = read.reshape(ROWS // 128, COLUMNS // 4, 32, 4, 4)
    return read.trans(0, 3, 2, 1, 4).reshape(ROWS, COLUMNS)


@triton.jit
def sum_of_part(
    part,
    x_rows,
    bx_rows,
    w_rows,
    bw_rows,
    in_m,
    bx_inside,
    bw_inside,
    K,
    blocks_per_split,
    ELEMENT: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The accumulator of one part of K.

    ``bx_inside`` and ``bw_inside`` are those of :func:`scales_in_order`, or None where the pointers
    are to the rows of the scales.
    """
    PACKED: tl.constexpr = 2 if ELEMENT == "e2m1" else 1
    GROUP: tl.constexpr = 16 if ELEMENT == "e2m1" else 32
    start, stop = split_bounds(part, K, blocks_per_split, BLOCK_K)
    acc = new_accumulator(BLOCK_M, BLOCK_N, SWAP)
    for k in range(start, stop, BLOCK_K):
        item, group = k // PACKED, k // GROUP
        x_tile = load_activations(x_rows, in_m, item, BLOCK_K // PACKED, K // PACKED, EVEN_K)
        if bx_inside is None:
            bx = load_activations(bx_rows, in_m, group, BLOCK_K // GROUP, K // GROUP, EVEN_K)
        else:
            bx = load_in_order(
                bx_rows, bx_inside, group, K // GROUP, BLOCK_M, BLOCK_K // GROUP, EVEN_K
            )
        w_tile = load_weights(w_rows, item, BLOCK_K // PACKED, K // PACKED, EVEN_K)
        if bw_inside is None:
            bw = load_weights(bw_rows, group, BLOCK_K // GROUP, K // GROUP, EVEN_K)
        else:
            bw = load_in_order(
                bw_rows, bw_inside, group, K // GROUP, BLOCK_N, BLOCK_K // GROUP, EVEN_K
            )
        acc = multiply_scaled(x_tile, bx, w_tile, bw, acc, ELEMENT, SWAP)
    return acc


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def gemm_native(
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
    stride_bw,
    stride_sx,
    stride_sw,
    blocks_per_split,
    ELEMENT: tl.constexpr,
    IN_ORDER: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Out [M, N] = (decode(x) @ decode(w).T) * scale_x * scale_w + bias [N].

    ELEMENT is "e2m1" (NVFP4: bytes [., K / 2] with E4M3 scales [., K / 16]) or "e4m3" (MXFP8: codes
    [., K] with exponents [., K / 32]). scale_x and scale_w are global fp32 scalars or None.
    IN_ORDER scales of tiles with 128 rows or more are read as tcgen05 wants them.
    Where SPLIT says that programs share K, ``out`` is as :func:`finish` takes it.
    """
    wait_for_inputs()
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rm = indices(tile_m, BLOCK_M)
    rn = indices(tile_n, BLOCK_N)
    x_rows = row_pointers(x, rm, stride_x)
    w_rows = weight_rows(w, rn, N, stride_w)
    bx_inside, bw_inside = None, None
    COLUMNS: tl.constexpr = BLOCK_K // (16 if ELEMENT == "e2m1" else 32)
    if IN_ORDER and BLOCK_M >= 128:
        bx_rows, bx_inside = scales_in_order(block_scale_x, tile_m, M, stride_bx, BLOCK_M, COLUMNS)
    else:
        bx_rows = row_pointers(block_scale_x, rm, stride_bx)
    if IN_ORDER and BLOCK_N >= 128:
        bw_rows, bw_inside = scales_in_order(block_scale_w, tile_n, N, stride_bw, BLOCK_N, COLUMNS)
    else:
        bw_rows = weight_rows(block_scale_w, rn, N, stride_bw)
    if SPLIT == "serial":
        acc = no_parts(BLOCK_M, BLOCK_N, SWAP)
        for part in range(number_of_parts(K, blocks_per_split, BLOCK_K)):
            acc += sum_of_part(
                part, x_rows, bx_rows, w_rows, bw_rows, rm < M, bx_inside, bw_inside,
                K, blocks_per_split, ELEMENT, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        acc = sum_of_part(
            tl.program_id(1), x_rows, bx_rows, w_rows, bw_rows, rm < M, bx_inside, bw_inside,
            K, blocks_per_split, ELEMENT, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    acc = by_rows(acc, SWAP)
    finish(acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, SPLIT)
