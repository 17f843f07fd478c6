"""FP8 weights whose scales multiply the finished sum: per tensor, per token, per channel."""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.reduce import finish
from mokernels.ops.kernels.tiles import (
    as_operand,
    by_rows,
    in_units,
    indices,
    load_activations,
    load_weights,
    multiply,
    new_accumulator,
    no_parts,
    number_of_parts,
    row_pointers,
    split_bounds,
    tile_of_program,
    weight_rows,
)


@triton.jit
def sum_of_part(
    part,
    x_rows,
    w_rows,
    in_m,
    K,
    blocks_per_split,
    COMPUTE: tl.constexpr,
    PROMOTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The accumulator of one part of K."""
    start, stop = split_bounds(part, K, blocks_per_split, BLOCK_K)
    acc = new_accumulator(BLOCK_M, BLOCK_N, SWAP)
    for k in range(start, stop, BLOCK_K):
        x_tile = load_activations(x_rows, in_m, k, BLOCK_K, K, EVEN_K)
        w_tile = load_weights(w_rows, k, BLOCK_K, K, EVEN_K)
        acc = multiply(as_operand(x_tile, COMPUTE), as_operand(w_tile, COMPUTE), acc, SWAP, PROMOTE)
    return in_units(acc, COMPUTE)


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def gemm_epilogue(
    x,
    w,
    scale_x,
    scale_w,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_sx,
    stride_sw,
    blocks_per_split,
    COMPUTE: tl.constexpr,
    PROMOTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Out [M, N] = (x [M, K] @ w [N, K].T) * scale_x [M] * scale_w [N] + bias [N].

    w is E4M3; x is E4M3 or a float type. Both are brought to COMPUTE, in which they are exact, or
    both exactly halves.
    Where SPLIT says that programs share K, ``out`` is as :func:`finish` takes it.
    """
    wait_for_inputs()
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rm = indices(tile_m, BLOCK_M)
    rn = indices(tile_n, BLOCK_N)
    x_rows = row_pointers(x, rm, stride_x)
    w_rows = weight_rows(w, rn, N, stride_w)
    if SPLIT == "serial":
        acc = no_parts(BLOCK_M, BLOCK_N, SWAP)
        for part in range(number_of_parts(K, blocks_per_split, BLOCK_K)):
            acc += sum_of_part(
                part, x_rows, w_rows, rm < M, K, blocks_per_split,
                COMPUTE, PROMOTE, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        acc = sum_of_part(
            tl.program_id(1), x_rows, w_rows, rm < M, K, blocks_per_split,
            COMPUTE, PROMOTE, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    acc = by_rows(acc, SWAP)
    finish(acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, SPLIT)
