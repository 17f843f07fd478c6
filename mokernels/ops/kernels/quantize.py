"""Quantize activations [rows, K], and dequantize codes again.

Four kernels: one factor for the whole tensor, one scale per row, one scale per block of a row, and
back. They compute what :mod:`mokernels.numerics` defines, to the bit: in fp32, with IEEE divisions
(``tl.div_rn``; a plain ``/`` becomes an approximation on a GPU).

Input rows may lie anywhere: row r starts at ``(r // inner) * outer_stride + (r % inner) *
inner_stride``, which covers a slice of a sequence in a batch without a copy. K is contiguous.
Outputs are contiguous. Codes are written as bytes, on every target.

Maxima are taken over magnitudes as integers: the bits of non-negative floats are ordered as their
values are, and NaN, which a maximum of floats would drop, is above infinity.
"""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.elements import (
    decode_e2m1,
    decode_e4m3,
    decode_e8m0,
    encode_e2m1_quotient,
    encode_e4m3,
    pack_nibbles,
    unpack_nibbles,
)

E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
E2M1_MAX: tl.constexpr = tl.constexpr(6.0)
FP8_TINY_AMAX: tl.constexpr = tl.constexpr(2.0**-24)
NVFP4_TINY_SCALE: tl.constexpr = tl.constexpr(1e-5)
NVFP4_SMALLEST_GLOBAL_SCALE: tl.constexpr = tl.constexpr(1e-12)


@triton.jit
def tile_of_program(k, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows [ROWS, 1] of this program and the number of its tile; tiles go along a row first."""
    tiles = tl.cdiv(k, COLUMNS)
    row = (tl.program_id(0) // tiles) * ROWS + tl.arange(0, ROWS)
    return row[:, None], tl.program_id(0) % tiles


@triton.jit
def columns_of(tile, COLUMNS: tl.constexpr):
    """Columns [1, COLUMNS] of a tile."""
    return (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]


@triton.jit
def row_starts(row, inner, outer_stride, inner_stride, NESTED: tl.constexpr):
    """Offsets of input rows, 64-bit; without NESTED there is one stride for all rows."""
    if NESTED:
        start = (row // inner).to(tl.int64) * outer_stride
        start += (row % inner).to(tl.int64) * inner_stride
    else:
        start = row.to(tl.int64) * inner_stride
    return start


@triton.jit
def magnitude_bits(x):
    """Bits of |x| as int32, for fp32 x."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def amax_of(x, AXIS: tl.constexpr):
    """Max |x| over an axis, NaN if there is one."""
    return tl.max(magnitude_bits(x), axis=AXIS).to(tl.float32, bitcast=True)


@triton.jit
def fp8_multiplier(amax):
    """448 / amax; an amax of at most 2 ** -24 counts as 1.

    Rounded twice, as torch computes a number divided by a tensor: 1 / amax, times 448.
    """
    return tl.div_rn(1.0, tl.where(amax <= FP8_TINY_AMAX, 1.0, amax)) * E4M3_MAX


@triton.jit
def mxfp8_exponent(amax):
    """Biased ceil(log2(amax / 448)), clamped to +-127, as int32; 0 and not finite: 127 (2 ** 0).

    448 = 1.75 * 2 ** 8: with amax = f * 2 ** x, f in [1, 2), it is x - 8, one more where f > 1.75.
    """
    bits = amax.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    regular = (bits > 0) & (bits < 0x7F800000)
    return tl.where(regular, tl.maximum(exponent, 0), 127)


@triton.jit
def nvfp4_step(amax, global_scale, CASTS_ONCE: tl.constexpr, HAS_TYPE: tl.constexpr):
    """Scales of NVFP4 blocks: (E4M3 code as a byte, what x is divided by, whether to keep codes).

    A block that is not kept has the scale 0 and the codes 0.
    """
    code = encode_e4m3(tl.div_rn(amax, E2M1_MAX * global_scale), CASTS_ONCE)
    step = decode_e4m3(code, tl.float32, HAS_TYPE) * global_scale
    # Not `step >= tiny`: that is false for NaN, which has to stay.
    tiny = step < NVFP4_TINY_SCALE
    return tl.where(tiny, 0, code).to(tl.uint8), step, tiny == 0


@triton.jit
def static_multiplier(factor, IS_MULTIPLIER: tl.constexpr):
    """The m that ``factor`` points to, or the one of the scale amax / 448 that it points to."""
    multiplier = tl.load(factor)
    if not IS_MULTIPLIER:
        multiplier = fp8_multiplier(E4M3_MAX * multiplier)
    return multiplier


@triton.jit
def store_scaled(value, multiplier, codes, row, column, mask, k, CASTS_ONCE: tl.constexpr):
    """E4M3 codes of value * multiplier to [row, column] of codes [rows, K]."""
    target = codes + row.to(tl.int64) * k + column
    tl.store(target, encode_e4m3(value * multiplier, CASTS_ONCE), mask=mask)


@triton.jit
def block_codes(
    tile,
    global_scale,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FAKE: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    HAS_TYPE: tl.constexpr,
):
    """Codes (with FAKE: values) [ROWS, COLUMNS] and scales [ROWS, COLUMNS / GROUP] of an fp32 tile.

    Both are as :func:`quantize_blocks` stores them, but that codes of "nvfp4" are not packed.
    """
    ROWS: tl.constexpr = tile.shape[0]
    BLOCKS: tl.constexpr = tile.shape[1] // GROUP
    value = tl.reshape(tile, (ROWS, BLOCKS, GROUP))
    amax = amax_of(value, 2)
    if FORMAT == "nvfp4":
        g = tl.load(global_scale)
        g = tl.where(g > 0, g, NVFP4_SMALLEST_GLOBAL_SCALE)
        scale, step, keep = nvfp4_step(amax, g, CASTS_ONCE, HAS_TYPE)
        code = encode_e2m1_quotient(value, step[:, :, None], keep[:, :, None])
        if FAKE:
            code = decode_e2m1(code, tl.float32)
            code = code * decode_e4m3(scale, tl.float32, HAS_TYPE)[:, :, None]
    elif FORMAT == "mxfp8":
        exponent = mxfp8_exponent(amax)
        # 2 ** -e has the biased exponent 254 - u, which is between 7 and 254.
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        scale = exponent.to(tl.uint8)
        code = encode_e4m3(value * inverse[:, :, None], CASTS_ONCE)
        if FAKE:
            code = decode_e4m3(code, tl.float32, HAS_TYPE)
            code = code * decode_e8m0(scale, tl.float32)[:, :, None]
    else:
        multiplier = fp8_multiplier(amax)
        scale = tl.div_rn(1.0, multiplier)
        code = encode_e4m3(value * multiplier[:, :, None], CASTS_ONCE)
    return tl.reshape(code, (ROWS, BLOCKS * GROUP)), scale


@triton.jit
def store_blocks(
    code,
    scale,
    codes,
    scales,
    row,
    tile,
    rows,
    k,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FAKE: tl.constexpr,
):
    """Store what :func:`block_codes` returned for ``row`` [ROWS, 1] and the tile of this number."""
    COLUMNS: tl.constexpr = code.shape[1]
    in_rows = row < rows
    long_row = row.to(tl.int64)
    if FORMAT == "nvfp4" and not FAKE:
        pair = columns_of(tile, COLUMNS // 2)
        pair_mask = in_rows & (pair < k // 2)
        tl.store(codes + long_row * (k // 2) + pair, pack_nibbles(code), mask=pair_mask)
    else:
        column = columns_of(tile, COLUMNS)
        code = code.to(codes.dtype.element_ty)
        tl.store(codes + long_row * k + column, code, mask=in_rows & (column < k))
    if not FAKE:
        blocks = tl.cdiv(k, GROUP)
        block = columns_of(tile, COLUMNS // GROUP)
        tl.store(scales + long_row * blocks + block, scale, mask=in_rows & (block < blocks))


@triton.jit
def static_scales(scale, multiplier, divisor):
    """The pair (m, 1 / m) of one stored scale amax / 448, all fp32 with one item; one program."""
    wait_for_inputs()
    m = static_multiplier(scale, False)
    tl.store(multiplier, m)
    tl.store(divisor, tl.div_rn(1.0, m))


@triton.jit(do_not_specialize=["rows", "inner"])
def quantize_static(
    x,
    factor,
    codes,
    rows,
    k,
    inner,
    outer_stride,
    inner_stride,
    IS_MULTIPLIER: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """E4M3 codes [rows, K] of x * m for one m: ``factor`` holds m, or else the scale amax / 448."""
    wait_for_inputs()
    row, tile = tile_of_program(k, ROWS, COLUMNS)
    column = columns_of(tile, COLUMNS)
    mask = (row < rows) & (column < k)
    start = row_starts(row, inner, outer_stride, inner_stride, NESTED)
    value = tl.load(x + start + column, mask=mask, other=0.0).to(tl.float32)
    multiplier = static_multiplier(factor, IS_MULTIPLIER)
    store_scaled(value, multiplier, codes, row, column, mask, k, CASTS_ONCE)


@triton.jit(do_not_specialize=["rows", "inner"])
def quantize_rows(
    x,
    codes,
    scales,
    rows,
    k,
    inner,
    outer_stride,
    inner_stride,
    ONE_PASS: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """E4M3 codes [rows, K] and one scale fp32 [rows] for each.

    ONE_PASS keeps the row in registers (COLUMNS >= K); otherwise it is read twice.
    """
    wait_for_inputs()
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    column = columns_of(0, COLUMNS)
    in_rows = row < rows
    start = row_starts(row, inner, outer_stride, inner_stride, NESTED)
    if ONE_PASS:
        mask = in_rows & (column < k)
        value = tl.load(x + start + column, mask=mask, other=0.0).to(tl.float32)
        multiplier = fp8_multiplier(amax_of(value, 1))[:, None]
        store_scaled(value, multiplier, codes, row, column, mask, k, CASTS_ONCE)
    else:
        bits = tl.zeros((ROWS, COLUMNS), tl.int32)
        for first in range(0, k, COLUMNS):
            mask = in_rows & (first + column < k)
            value = tl.load(x + start + first + column, mask=mask, other=0.0).to(tl.float32)
            bits = tl.maximum(bits, magnitude_bits(value))
        multiplier = fp8_multiplier(tl.max(bits, axis=1).to(tl.float32, bitcast=True))[:, None]
        for first in range(0, k, COLUMNS):
            mask = in_rows & (first + column < k)
            value = tl.load(x + start + first + column, mask=mask, other=0.0).to(tl.float32)
            store_scaled(value, multiplier, codes, row, first + column, mask, k, CASTS_ONCE)
    tl.store(scales + row, tl.div_rn(1.0, multiplier), mask=in_rows)


@triton.jit(do_not_specialize=["rows", "inner"])
def quantize_blocks(
    x,
    global_scale,
    codes,
    scales,
    rows,
    k,
    inner,
    outer_stride,
    inner_stride,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FAKE: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    HAS_TYPE: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One scale per GROUP elements of a row; FORMAT is "fp8", "nvfp4" or "mxfp8".

    codes [rows, K] (or [rows, K / 2] for "nvfp4") and scales [rows, ceil(K / GROUP)] are bytes,
    except that the scales of "fp8" are fp32. With FAKE, ``codes`` takes the values code * scale in
    its own dtype instead, without the global scale, and nothing else is stored.
    """
    wait_for_inputs()
    row, tile = tile_of_program(k, ROWS, COLUMNS)
    column = columns_of(tile, COLUMNS)
    mask = (row < rows) & (column < k)
    start = row_starts(row, inner, outer_stride, inner_stride, NESTED)
    value = tl.load(x + start + column, mask=mask, other=0.0).to(tl.float32)
    code, scale = block_codes(value, global_scale, FORMAT, GROUP, FAKE, CASTS_ONCE, HAS_TYPE)
    store_blocks(code, scale, codes, scales, row, tile, rows, k, FORMAT, GROUP, FAKE)


@triton.jit(do_not_specialize=["rows", "inner"])
def dequantize_blocks(
    codes,
    scales,
    global_scale,
    out,
    rows,
    k,
    inner,
    outer_stride,
    inner_stride,
    scale_row_stride,
    scale_stride,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    HAS_TYPE: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Out [rows, K] = code * scale, in fp32 and rounded once to out's dtype.

    The scale of element [r, c] is at ``(r // SCALE_ROWS) * scale_row_stride + (c // GROUP) *
    scale_stride``: a stride of 0 repeats one scale along the rows or along K. Those of "nvfp4" are
    times ``global_scale``, if that is not None.
    """
    wait_for_inputs()
    BLOCKS: tl.constexpr = COLUMNS // GROUP
    row, tile = tile_of_program(k, ROWS, COLUMNS)
    column = columns_of(tile, COLUMNS)
    start = row_starts(row, inner, outer_stride, inner_stride, NESTED)
    block = columns_of(tile, BLOCKS)
    scale_offset = (row // SCALE_ROWS).to(tl.int64) * scale_row_stride + block * scale_stride
    scale_mask = (row < rows) & (block * GROUP < k)
    scale = tl.load(scales + scale_offset, mask=scale_mask, other=0)
    if FORMAT == "nvfp4":
        pair = columns_of(tile, COLUMNS // 2)
        packed_mask = (row < rows) & (pair < k // 2)
        packed = tl.load(codes + start + pair, mask=packed_mask, other=0)
        value = decode_e2m1(unpack_nibbles(packed), tl.float32)
        scale = decode_e4m3(scale, tl.float32, HAS_TYPE)
        if global_scale is not None:
            scale *= tl.load(global_scale)
    else:
        code = tl.load(codes + start + column, mask=(row < rows) & (column < k), other=0)
        value = decode_e4m3(code, tl.float32, HAS_TYPE)
        if FORMAT == "mxfp8":
            scale = decode_e8m0(scale, tl.float32)
    value = tl.reshape(value, (ROWS, BLOCKS, GROUP)) * scale[:, :, None]
    value = tl.reshape(value, (ROWS, COLUMNS)).to(out.dtype.element_ty)
    mask = (row < rows) & (column < k)
    tl.store(out + row.to(tl.int64) * k + column, value, mask=mask)
