"""FP8 products of activations that are still floats: each program quantizes the rows it reads."""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.elements import encode_e4m3
from mokernels.ops.kernels.quantize import fp8_multiplier, magnitude_bits
from mokernels.ops.kernels.reduce import finish
from mokernels.ops.kernels.tiles import (
    by_rows,
    indices,
    load_activations,
    load_weights,
    multiply,
    new_accumulator,
    row_pointers,
    split_bounds,
    tile_of_program,
    weight_rows,
)

AMAX_STAGES: tl.constexpr = tl.constexpr(4)


@triton.jit
def multipliers_of_rows(x_rows, in_m, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """What quantize_rows multiplies each row with, fp32 [BLOCK_M]; reads the whole of K."""
    # Tiles as wide as those of the main loop: with others the compilers of sm_89 and sm_120 bring
    # the multipliers, and with them the encoding, to the matrix instruction's layout, in which
    # every warp encodes all of x. A step takes 1 KiB of each row, since it waits for its loads.
    LOADS: tl.constexpr = 1024 * 8 // (BLOCK_K * x_rows.dtype.element_ty.primitive_bitwidth)
    bits = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for step in tl.range(0, K, LOADS * BLOCK_K, num_stages=AMAX_STAGES):
        for load in tl.static_range(LOADS):
            tile = load_activations(x_rows, in_m, step + load * BLOCK_K, BLOCK_K, K, False)
            bits = tl.maximum(bits, magnitude_bits(tile.to(tl.float32)))
    return fp8_multiplier(tl.max(bits, axis=1).to(tl.float32, bitcast=True))


@triton.jit
def quantized(
    tile, multiplier, k, K, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, CASTS_ONCE: tl.constexpr
):
    """A tile of x from column ``k`` on as E4M3; 0 beyond K, whatever the multiplier."""
    code = encode_e4m3(tile.to(tl.float32) * multiplier, CASTS_ONCE)
    if not EVEN_K:
        code = tl.where(k + tl.arange(0, BLOCK_K)[None, :] < K, code, 0).to(tl.uint8)
    return code.to(tl.float8e4nv, bitcast=True)


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def gemm_quantizing(
    x,
    w,
    factor,
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
    QUANTIZE: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    PROMOTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """gemm_epilogue of the codes that quantize_static or quantize_rows make of x, to the bit.

    x is bf16, fp16 or fp32 and w E4M3. QUANTIZE says what ``factor`` is: with "static" the
    multiplier m of all of x, fp32 [1]. With "token" each row has its own, which every program
    derives from the row's maximum and whose inverse scales its sums; with SPLIT "parts" one program
    of a row tile stores these inverses to ``factor``, fp32 [M], for the reduction.
    Where SPLIT says that programs share K, ``out`` is as :func:`finish` takes it.
    It has no serial split: that is for more rows than it is launched with.
    """
    wait_for_inputs()
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rm = indices(tile_m, BLOCK_M)
    rn = indices(tile_n, BLOCK_N)
    x_rows = row_pointers(x, rm, stride_x)
    w_rows = weight_rows(w, rn, N, stride_w)
    if QUANTIZE == "token":
        row_multiplier = multipliers_of_rows(x_rows, rm < M, K, BLOCK_M, BLOCK_K)
        row_scale = tl.div_rn(1.0, row_multiplier)
        multiplier = row_multiplier[:, None]
    else:
        multiplier = tl.load(factor)
    start, stop = split_bounds(tl.program_id(1), K, blocks_per_split, BLOCK_K)
    acc = new_accumulator(BLOCK_M, BLOCK_N, SWAP)
    for k in range(start, stop, BLOCK_K):
        x_tile = load_activations(x_rows, rm < M, k, BLOCK_K, K, EVEN_K)
        w_tile = load_weights(w_rows, k, BLOCK_K, K, EVEN_K)
        codes = quantized(x_tile, multiplier, k, K, BLOCK_K, EVEN_K, CASTS_ONCE)
        acc = multiply(codes, w_tile, acc, SWAP, PROMOTE)
    acc = by_rows(acc, SWAP)
    if QUANTIZE == "token":
        if SPLIT != "parts":
            scale_x = row_scale
        elif tile_n + tl.program_id(1) == 0:
            tl.store(factor + rm, row_scale, mask=rm < M)
    finish(acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, SPLIT)
