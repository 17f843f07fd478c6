"""Compute activations and quantize them in one pass: RMSNorm, and a gated activation function.

The values are those of the eager modules: fp32 arithmetic, rounded to the activations' dtype where
the modules round. They are quantized by the functions of :mod:`mokernels.ops.kernels.quantize`.

Launches switch the contraction to multiply-adds off: which products it takes would depend on the
build of the kernel. Then a row's result depends on nothing but the row.
"""

import triton
import triton.language as tl

from mokernels.ops.kernels.dependents import wait_for_inputs
from mokernels.ops.kernels.quantize import (
    amax_of,
    block_codes,
    columns_of,
    fp8_multiplier,
    magnitude_bits,
    row_starts,
    static_multiplier,
    store_blocks,
    store_scaled,
    tile_of_program,
)


@triton.jit
def sum_of_row(value):
    """Sum [1, 1] of fp32 [1, COLUMNS], COLUMNS a power of two, added in one fixed order.

    ``tl.sum`` of more than two follows the layout of its operand, which follows the alignment of
    the loads and the stores: a row could get another sum than its copy in a wider tensor, and one
    format another than the next. A sum of two has no order. The row is folded in halves first, as
    long as these lie in one thread; from there on neighbours are added.
    """
    HALVED: tl.constexpr = min(value.shape[1] // 2, 4096)
    for _ in tl.static_range(16):
        if value.shape[1] > HALVED:
            value = tl.sum(tl.reshape(value, (1, 2, value.shape[1] // 2)), axis=1)
    for _ in tl.static_range(16):
        if value.shape[1] > 1:
            value = tl.sum(tl.reshape(value, (1, value.shape[1] // 2, 2)), axis=2)
    return value


@triton.jit
def inverse_rms(sum_of_squares, k, eps):
    """1 / sqrt(sum / K + eps), every operation an IEEE one: the same bits on every device."""
    mean = tl.div_rn(sum_of_squares, tl.zeros_like(sum_of_squares) + k)
    return tl.div_rn(1.0, tl.sqrt_rn(mean + eps))


@triton.jit
def load_sum(x, residual, start, residual_start, column, mask):
    """x, or x + residual rounded to their dtype, in fp32; 0 where masked."""
    value = tl.load(x + start + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        other = tl.load(residual + residual_start + column, mask=mask, other=0.0)
        value = (value + other.to(tl.float32)).to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def normalized(value, inverse, weight, column, mask, STYLE: tl.constexpr, DTYPE: tl.constexpr):
    """fp32 values of the norm of ``value``, rounded as STYLE says; 0 where masked.

    "cast_then_scale" rounds to DTYPE, that of x, before the weight multiplies in the dtype that the
    two promote to; the other styles multiply in fp32 and round once.
    """
    w = tl.load(weight + column, mask=mask, other=0.0)
    value = value * inverse
    if STYLE == "cast_then_scale":
        value = value.to(DTYPE).to(tl.float32) * w.to(tl.float32)
        # Two different dtypes promote to fp32.
        if w.dtype == DTYPE:
            value = value.to(DTYPE).to(tl.float32)
    elif STYLE == "one_plus_weight":
        value = (value * (1.0 + w.to(tl.float32))).to(DTYPE).to(tl.float32)
    else:
        value = (value * w.to(tl.float32)).to(DTYPE).to(tl.float32)
    # The inverse may be infinite, and 0 * inf is NaN, which must not reach a maximum.
    return tl.where(mask, value, 0.0)


@triton.jit
def activated(gate, ACTIVATION: tl.constexpr):
    """The activation function in fp32."""
    if ACTIVATION == "silu":
        value = tl.div_rn(gate, 1.0 + tl.exp(-gate))
    elif ACTIVATION == "gelu":
        value = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    else:
        # Triton's language has no tanh: 0.5 * (1 + tanh(z)) is the sigmoid of 2 z.
        z = 0.7978845608028654 * (gate + 0.044715 * (gate * gate * gate))
        value = tl.div_rn(gate, 1.0 + tl.exp(-2.0 * z))
    return value


@triton.jit
def load_gated(gate, up, start, up_start, column, mask, ACTIVATION: tl.constexpr):
    """act(gate) * up in fp32, both the activation and the product rounded to the dtype of gate."""
    DTYPE: tl.constexpr = gate.dtype.element_ty
    value = tl.load(gate + start + column, mask=mask, other=0.0).to(tl.float32)
    value = activated(value, ACTIVATION).to(DTYPE).to(tl.float32)
    value = value * tl.load(up + up_start + column, mask=mask, other=0.0).to(tl.float32)
    return value.to(DTYPE).to(tl.float32)


@triton.jit
def store_quantized(
    value,
    multiplier,
    global_scale,
    codes,
    scales,
    row,
    tile,
    rows,
    k,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FAKE: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    HAS_TYPE: tl.constexpr,
):
    """Quantize an fp32 tile and store it; "static" and "token" take ``multiplier``."""
    if FORMAT == "static" or FORMAT == "token":
        column = columns_of(tile, value.shape[1])
        mask = (row < rows) & (column < k)
        store_scaled(value, multiplier, codes, row, column, mask, k, CASTS_ONCE)
    else:
        code, scale = block_codes(value, global_scale, FORMAT, GROUP, FAKE, CASTS_ONCE, HAS_TYPE)
        store_blocks(code, scale, codes, scales, row, tile, rows, k, FORMAT, GROUP, FAKE)


@triton.jit
def multiplier_of_rows(amax, scales, row, rows):
    """Multipliers [ROWS, 1] for amax [ROWS]; their inverses are stored as the rows' scales."""
    multiplier = fp8_multiplier(amax)[:, None]
    tl.store(scales + row, tl.div_rn(1.0, multiplier), mask=row < rows)
    return multiplier


@triton.jit(do_not_specialize=["rows", "inner", "residual_inner"])
def norm_quantize(
    x,
    residual,
    weight,
    total,
    factor,
    codes,
    scales,
    rows,
    k,
    inner,
    outer_stride,
    inner_stride,
    residual_inner,
    residual_outer_stride,
    residual_inner_stride,
    eps,
    STYLE: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FAKE: tl.constexpr,
    IS_MULTIPLIER: tl.constexpr,
    ONE_PASS: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    HAS_TYPE: tl.constexpr,
    NESTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize the RMSNorm of x, or of x + residual, which then goes to ``total`` [rows, K].

    One row for a program. FORMAT is "static" or "token" (E4M3 with one scale for all, for a row) or
    one of :func:`quantize_blocks`; ``factor`` is the static scale or multiplier, or the global
    scale. ONE_PASS keeps the row in registers (COLUMNS >= K); otherwise it is read again.
    """
    wait_for_inputs()
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = (tl.program_id(0) + tl.arange(0, 1))[:, None]
    start = row_starts(row, inner, outer_stride, inner_stride, NESTED)
    other = start
    if residual is not None:
        other = row_starts(
            row, residual_inner, residual_outer_stride, residual_inner_stride, NESTED
        )
    target = row.to(tl.int64) * k
    multiplier = 1.0
    if FORMAT == "static":
        multiplier = static_multiplier(factor, IS_MULTIPLIER)
    if ONE_PASS:
        column = columns_of(0, COLUMNS)
        mask = column < k
        value = load_sum(x, residual, start, other, column, mask)
        if residual is not None:
            tl.store(total + target + column, value.to(DTYPE), mask=mask)
        inverse = inverse_rms(sum_of_row(value * value), k, eps)
        value = normalized(value, inverse, weight, column, mask, STYLE, DTYPE)
        if FORMAT == "token":
            multiplier = multiplier_of_rows(amax_of(value, 1), scales, row, rows)
        store_quantized(
            value, multiplier, factor, codes, scales, row, 0, rows, k,
            FORMAT, GROUP, FAKE, CASTS_ONCE, HAS_TYPE,
        )  # fmt: skip
    else:
        tiles = tl.cdiv(k, COLUMNS)
        squares = tl.zeros((1, COLUMNS), tl.float32)
        for tile in range(tiles):
            column = columns_of(tile, COLUMNS)
            mask = column < k
            value = load_sum(x, residual, start, other, column, mask)
            if residual is not None:
                tl.store(total + target + column, value.to(DTYPE), mask=mask)
            squares += value * value
        inverse = inverse_rms(sum_of_row(squares), k, eps)
        if FORMAT == "token":
            bits = tl.zeros((1, COLUMNS), tl.int32)
            for tile in range(tiles):
                column = columns_of(tile, COLUMNS)
                mask = column < k
                value = load_sum(x, residual, start, other, column, mask)
                value = normalized(value, inverse, weight, column, mask, STYLE, DTYPE)
                bits = tl.maximum(bits, magnitude_bits(value))
            amax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
            multiplier = multiplier_of_rows(amax, scales, row, rows)
        for tile in range(tiles):
            column = columns_of(tile, COLUMNS)
            mask = column < k
            value = load_sum(x, residual, start, other, column, mask)
            value = normalized(value, inverse, weight, column, mask, STYLE, DTYPE)
            store_quantized(
                value, multiplier, factor, codes, scales, row, tile, rows, k,
                FORMAT, GROUP, FAKE, CASTS_ONCE, HAS_TYPE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "inner", "up_inner"])
def gated_quantize(
    gate,
    up,
    factor,
    codes,
    scales,
    rows,
    k,
    inner,
    outer_stride,
    inner_stride,
    up_inner,
    up_outer_stride,
    up_inner_stride,
    ACTIVATION: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    FAKE: tl.constexpr,
    IS_MULTIPLIER: tl.constexpr,
    ONE_PASS: tl.constexpr,
    CASTS_ONCE: tl.constexpr,
    HAS_TYPE: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize act(gate) * up; FORMAT and ``factor`` as for :func:`norm_quantize`.

    A program takes a tile, or with "token" whole rows: in registers with ONE_PASS (COLUMNS >= K),
    otherwise computed twice.
    """
    wait_for_inputs()
    if FORMAT == "token":
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
        tile = 0
    else:
        row, tile = tile_of_program(k, ROWS, COLUMNS)
    start = row_starts(row, inner, outer_stride, inner_stride, NESTED)
    up_start = row_starts(row, up_inner, up_outer_stride, up_inner_stride, NESTED)
    multiplier = 1.0
    if FORMAT == "static":
        multiplier = static_multiplier(factor, IS_MULTIPLIER)
    if FORMAT != "token" or ONE_PASS:
        column = columns_of(tile, COLUMNS)
        mask = (row < rows) & (column < k)
        value = load_gated(gate, up, start, up_start, column, mask, ACTIVATION)
        if FORMAT == "token":
            multiplier = multiplier_of_rows(amax_of(value, 1), scales, row, rows)
        store_quantized(
            value, multiplier, factor, codes, scales, row, tile, rows, k,
            FORMAT, GROUP, FAKE, CASTS_ONCE, HAS_TYPE,
        )  # fmt: skip
    else:
        bits = tl.zeros((ROWS, COLUMNS), tl.int32)
        for step in range(tl.cdiv(k, COLUMNS)):
            column = columns_of(step, COLUMNS)
            mask = (row < rows) & (column < k)
            value = load_gated(gate, up, start, up_start, column, mask, ACTIVATION)
            bits = tl.maximum(bits, magnitude_bits(value))
        amax = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
        multiplier = multiplier_of_rows(amax, scales, row, rows)
        for step in range(tl.cdiv(k, COLUMNS)):
            column = columns_of(step, COLUMNS)
            mask = (row < rows) & (column < k)
            value = load_gated(gate, up, start, up_start, column, mask, ACTIVATION)
            store_quantized(
                value, multiplier, factor, codes, scales, row, step, rows, k,
                FORMAT, GROUP, FAKE, CASTS_ONCE, HAS_TYPE,
            )  # fmt: skip
