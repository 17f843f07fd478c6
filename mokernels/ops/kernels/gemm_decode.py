"""NVFP4 and MXFP8 weights, decoded and scaled in registers, times 16-bit or fp32 activations."""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.elements import decode_e8m0
from mokernels.ops.kernels.quantize import block_codes
from mokernels.ops.kernels.reduce import finish
from mokernels.ops.kernels.tiles import (
    as_operand,
    by_rows,
    indices,
    load_activations,
    load_columns,
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
from mokernels.ops.kernels.words import by_words, decode_words, paired, word_columns


@triton.jit
def scaled_groups(values, scale):
    """Values [N, K] times scale [N, K / g], each scale for g neighbours."""
    rows: tl.constexpr = values.shape[0]
    groups: tl.constexpr = scale.shape[1]
    grouped = tl.reshape(values, (rows, groups, values.shape[1] // groups))
    return tl.reshape(grouped * scale[:, :, None], (rows, values.shape[1]))


@triton.jit
def decode_nvfp4(packed, scale, DTYPE: tl.constexpr):
    """Bytes [N, K / 2] and E4M3 scales [N, K / 16] to code * scale * 2 ** -8 (fp16) or 2 ** -9.

    A code's sign and magnitude are moved to their places in a float, which makes code * 2 ** -14
    (fp16) or 2 ** -126 (bf16, fp32); one multiplication by the block scale, itself times a power
    of two, both scales and undoes that. It is exact, since code * scale has at most 6 significant
    bits and is a multiple of 2 ** -10 below 2 ** 12. The power of two that is left over keeps
    scale * 2 ** 126 inside the type; :func:`left_over` is its inverse.
    """
    low = packed & 0xF
    high = packed >> 4
    codes = tl.interleave(low, high).to(tl.uint16)
    if DTYPE == tl.float16:
        moved = ((codes & 8) << 12) | ((codes & 7) << 9)
        values = moved.to(tl.float16, bitcast=True)
        factor = (as_operand(scale, tl.float32) * 64.0).to(tl.float16)
    else:
        moved = ((codes & 8) << 12) | ((codes & 7) << 6)
        values = moved.to(tl.bfloat16, bitcast=True)
        factor = (as_operand(scale, tl.float32) * 1.661534994731145e35).to(tl.bfloat16)  # 2 ** 117
    return scaled_groups(values, factor).to(DTYPE)


@triton.jit
def decode_mxfp8(codes, exponents, DTYPE: tl.constexpr):
    """E4M3 codes [N, K] and exponents [N, K / 32] to code * 2 ** (u - 127).

    Exact in fp32 and bf16 but for products below 2 ** -133 (bf16; 2 ** -149 in fp32), which round.
    """
    return scaled_groups(as_operand(codes, DTYPE), decode_e8m0(exponents, DTYPE))


@triton.jit
def load_row(x, offset, COLUMNS: tl.constexpr, limit):
    """Fp32 [1, COLUMNS] items of the one row of x; 0 beyond ``limit``."""
    columns = offset + tl.arange(0, COLUMNS)[None, :]
    return tl.load(x + columns, mask=columns < limit, other=0.0).to(tl.float32)


@triton.jit
def quantized_row(
    row,
    global_scale,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    HAS_TYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The values code * scale of a row [1, K] that is quantized, once for each of ROWS rows."""
    values, _ = block_codes(row, global_scale, FORMAT, GROUP, True, CASTS_ONCE, HAS_TYPE)
    return tl.broadcast_to(values.to(COMPUTE), (ROWS, row.shape[1]))


@triton.jit
def sum_of_part(
    part,
    x,
    x_rows,
    w_rows,
    s_rows,
    global_scale_x,
    in_m,
    K,
    blocks_per_split,
    FORMAT: tl.constexpr,
    COMPUTE: tl.constexpr,
    QUANTIZE: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The accumulator of one part of K; with QUANTIZE x is read as one row, else by ``x_rows``."""
    WORDS: tl.constexpr = FORMAT == "nvfp4x2" or FORMAT == "nvfp4x8"
    RUN: tl.constexpr = 2 if FORMAT == "nvfp4x2" else 8
    PACKED: tl.constexpr = 1 if FORMAT == "mxfp8" else 8 if WORDS else 2
    GROUP: tl.constexpr = 32 if FORMAT == "mxfp8" else 16
    start, stop = split_bounds(part, K, blocks_per_split, BLOCK_K)
    acc = new_accumulator(BLOCK_M, BLOCK_N, SWAP)
    if QUANTIZE:
        ELEMENTS: tl.constexpr = "mxfp8" if FORMAT == "mxfp8" else "nvfp4"
        HAS_TYPE: tl.constexpr = (
            w_rows if FORMAT == "mxfp8" else s_rows
        ).dtype.element_ty != tl.uint8
        row = load_row(x, start, BLOCK_K, K)
    for k in range(start, stop, BLOCK_K):
        if QUANTIZE:
            x_tile = quantized_row(
                row, global_scale_x, ELEMENTS, GROUP, CASTS_ONCE, HAS_TYPE, COMPUTE, BLOCK_M
            )
            if WORDS:
                x_tile = by_words(x_tile)
            # Too few bytes for a thread to be copied asynchronously: loaded a step ahead instead.
            row = load_row(x, k + BLOCK_K, BLOCK_K, K)
        elif WORDS:
            x_tile = load_columns(x_rows, in_m, k + word_columns(BLOCK_K), K, EVEN_K).to(COMPUTE)
        else:
            x_tile = load_activations(x_rows, in_m, k, BLOCK_K, K, EVEN_K).to(COMPUTE)
        codes = load_weights(w_rows, k // PACKED, BLOCK_K // PACKED, K // PACKED, EVEN_K)
        scale = load_weights(s_rows, k // GROUP, BLOCK_K // GROUP, K // GROUP, EVEN_K)
        if WORDS:
            x_tile = paired(x_tile, RUN)
            w_tile = decode_words(codes, scale, COMPUTE, RUN)
        elif FORMAT == "nvfp4":
            w_tile = decode_nvfp4(codes, scale, COMPUTE)
        else:
            w_tile = decode_mxfp8(codes, scale, COMPUTE)
        acc = multiply(x_tile, w_tile, acc, SWAP, None)
    if FORMAT != "mxfp8":
        acc = acc * (256.0 if COMPUTE == tl.float16 else 512.0)
    return acc


@triton.jit(do_not_specialize=["M", "blocks_per_split"])
def gemm_decode(
    x,
    w,
    block_scale,
    global_scale_x,
    scale_x,
    scale_w,
    bias,
    out,
    M,
    N,
    K,
    stride_x,
    stride_w,
    stride_block_scale,
    stride_sx,
    stride_sw,
    blocks_per_split,
    FORMAT: tl.constexpr,
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
    """Out [M, N] = (x [M, K] @ decode(w, block_scale) [N, K].T) * scale_x * scale_w + bias [N].

    FORMAT is "nvfp4" (w bytes [N, K / 2], block_scale E4M3 [N, K / 16]) or "mxfp8" (w E4M3 [N, K],
    block_scale exponents [N, K / 32]). "nvfp4x2" and "nvfp4x8" are "nvfp4" with w as int32 words
    [N, K / 8] and an order of K that words.py tells, for NVIDIA and 16 bits: their ``stride_w``
    still counts bytes, of which the compiler sees that rows are aligned to 16.
    x is brought to COMPUTE, in which the decoded weight is exact: bf16, fp16 (NVFP4 only) or fp32.
    scale_x and scale_w are global fp32 scalars or None.
    With QUANTIZE x is one row of floats, M being 1, and each program quantizes what it reads of it
    as quantize_blocks does, to the bit, COMPUTE being bf16. NVFP4 does so by ``global_scale_x``,
    which is None otherwise and is scale_x too.
    Where SPLIT says that programs share K, ``out`` is as :func:`finish` takes it.
    """
    wait_for_inputs()
    tile_m, tile_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rm = indices(tile_m, BLOCK_M)
    rn = indices(tile_n, BLOCK_N)
    x_rows = row_pointers(x, rm, stride_x)
    if FORMAT == "nvfp4x2" or FORMAT == "nvfp4x8":
        stride_w = stride_w // 4
    w_rows = weight_rows(w, rn, N, stride_w)
    s_rows = weight_rows(block_scale, rn, N, stride_block_scale)
    if SPLIT == "serial":
        acc = no_parts(BLOCK_M, BLOCK_N, SWAP)
        for part in range(number_of_parts(K, blocks_per_split, BLOCK_K)):
            acc += sum_of_part(
                part, x, x_rows, w_rows, s_rows, global_scale_x, rm < M, K, blocks_per_split,
                FORMAT, COMPUTE, QUANTIZE, CASTS_ONCE, EVEN_K, SWAP, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        acc = sum_of_part(
            tl.program_id(1), x, x_rows, w_rows, s_rows, global_scale_x, rm < M, K,
            blocks_per_split, FORMAT, COMPUTE, QUANTIZE, CASTS_ONCE, EVEN_K, SWAP,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    acc = by_rows(acc, SWAP)
    finish(acc, rm, rn, M, N, scale_x, stride_sx, scale_w, stride_sw, bias, out, SPLIT)
