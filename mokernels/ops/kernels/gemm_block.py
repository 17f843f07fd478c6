"""FP8 with scales per 128 of K: each K block's products are scaled on the fp32 accumulator."""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.gemm_quantizing import quantized
from mokernels.ops.kernels.quantize import amax_of, fp8_multiplier
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
def by_x_rows(scale, SWAP: tl.constexpr):
    """Scales of rows of x [BLOCK_M], broadcastable against the accumulator."""
    if SWAP:
        rows = scale[None, :]
    else:
        rows = scale[:, None]
    return rows


@triton.jit
def block_factor(rows, scale_w, SWAP: tl.constexpr):
    """What multiplies the products of a K block, broadcastable against the accumulator.

    ``rows`` are the scales of x [BLOCK_M], ``scale_w`` points to the one of the weight; a scale
    that is None has no blocks, and one of the two has.
    """
    if rows is None:
        factor = tl.load(scale_w)
    else:
        if scale_w is not None:
            rows = rows * tl.load(scale_w)
        factor = by_x_rows(rows, SWAP)
    return factor


@triton.jit
def add_block(
    acc, x, w, rows, scale_w, SWAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Acc + x @ w.T of one K block, times the scales that :func:`block_factor` takes."""
    zeros = new_accumulator(BLOCK_M, BLOCK_N, SWAP)
    factor = in_units(block_factor(rows, scale_w, SWAP), w.dtype)
    return acc + multiply(x, w, zeros, SWAP, None) * factor


@triton.jit
def sum_of_part(
    part,
    x_rows,
    w_rows,
    bx_rows,
    block_scale_w,
    in_m,
    K,
    blocks_per_split,
    COMPUTE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The accumulator of one part of K; ``block_scale_w`` points to the tile's first scale."""
    start, stop = split_bounds(part, K, blocks_per_split, BLOCK_K)
    acc = new_accumulator(BLOCK_M, BLOCK_N, SWAP)
    for k in range(start, stop, BLOCK_K):
        x_tile = load_activations(x_rows, in_m, k, BLOCK_K, K, EVEN_K)
        w_tile = as_operand(load_weights(w_rows, k, BLOCK_K, K, EVEN_K), COMPUTE)
        bw = block_scale_w
        if block_scale_w is not None:
            bw += k // 128
        bx = None
        if QUANTIZE:
            multiplier = fp8_multiplier(amax_of(x_tile.to(tl.float32), 1))
            x_tile = quantized(x_tile, multiplier[:, None], k, K, BLOCK_K, EVEN_K, CASTS_ONCE)
            bx = tl.div_rn(1.0, multiplier)
        else:
            x_tile = as_operand(x_tile, COMPUTE)
            if bx_rows is not None:
                bx = tl.load(bx_rows + k // 128, mask=in_m, other=0.0)
        acc = add_block(acc, x_tile, w_tile, bx, bw, SWAP, BLOCK_M, BLOCK_N)
    return acc


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
    stride_bw,
    stride_sx,
    stride_sw,
    blocks_per_split,
    COMPUTE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
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
    ``block_scale_x`` and ``block_scale_w``, contiguous along K. One of them may be None (1), and
    its operand may have a scale of the finished sum instead. BLOCK_K and BLOCK_N divide 128, so
    that a step along K meets one scale for each row of x, and one for the tile's weights. The sum
    over steps is in fp32, whatever the hardware does inside one.
    With QUANTIZE x is bf16, fp16 or fp32, and each program quantizes what it reads as
    quantize_blocks does, to the bit; BLOCK_K is 128 then, and ``block_scale_x`` None.
    Where SPLIT says that programs share K, ``out`` is as :func:`finish` takes it.
    """
    wait_for_inputs()
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rm = indices(tile_m, BLOCK_M)
    rn = indices(tile_n, BLOCK_N)
    x_rows = row_pointers(x, rm, stride_x)
    w_rows = weight_rows(w, rn, N, stride_w)
    bx_rows = None
    if block_scale_x is not None:
        bx_rows = block_scale_x + rm.to(tl.int64) * stride_bx
    if block_scale_w is not None:
        block_scale_w += tile_n * BLOCK_N // 128 * stride_bw
    if SPLIT == "serial":
        acc = no_parts(BLOCK_M, BLOCK_N, SWAP)
        for part in range(number_of_parts(K, blocks_per_split, BLOCK_K)):
            acc += sum_of_part(
                part, x_rows, w_rows, bx_rows, block_scale_w, rm < M, K, blocks_per_split,
                COMPUTE, QUANTIZE, CASTS_ONCE, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        acc = sum_of_part(
            tl.program_id(1), x_rows, w_rows, bx_rows, block_scale_w, rm < M, K, blocks_per_split,
            COMPUTE, QUANTIZE, CASTS_ONCE, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    acc = by_rows(acc, SWAP)
    finish(acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, SPLIT)
