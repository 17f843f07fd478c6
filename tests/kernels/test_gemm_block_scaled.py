"""NVFP4 and MXFP8 GEMMs, weights with and without quantized activations, against exact products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mokernels import numerics
from mokernels.ops import launch
from mokernels.ops.configs import BLOCKS_PER_SPLIT, Kind, bucket, choose
from mokernels.ops.target import HIP_TARGETS, SM_100, Target
from tests.kernels.products import (
    BF16,
    FP8,
    FP16,
    FP32,
    TARGETS,
    Draw,
    assert_product,
    biases,
    columns,
    few_processors,
    floats,
    layouts,
    leads,
    restride,
    seeds,
    targets,
)
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting

NAMES = {BF16: "bfloat16", FP16: "float16", FP32: "float32"}
nvfp4_inner = st.sampled_from([16, 48, 128, 144, 256, 304])
mxfp8_inner = st.sampled_from([32, 96, 128, 160, 256, 320])
ALL_TARGETS = (*TARGETS, *HIP_TARGETS) if interpreting() else TARGETS
all_targets = st.sampled_from(ALL_TARGETS)
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def nvfp4(draw: Draw, *shape: int, layout: str = "dense") -> tuple[torch.Tensor, ...]:
    """Codes, block scales and a global scale for elements of this shape."""
    lead, k = shape[:-1], shape[-1]
    codes, scale = draw.packed(*lead, k // 2), draw.block_scale(*lead, k // 16)
    return restride(codes, layout), restride(scale, layout), draw.scale()


def mxfp8(draw: Draw, *shape: int, layout: str = "dense") -> tuple[torch.Tensor, ...]:
    """Codes and exponents for elements of this shape."""
    lead, k = shape[:-1], shape[-1]
    codes, exponents = draw.e4m3(*lead, k), draw.exponents(*lead, k // 32)
    return restride(codes, layout), restride(exponents, layout)


@settings(max_examples=25)
@given(seeds, all_targets, leads, columns, nvfp4_inner, floats, biases, layouts)
def test_nvfp4_gemm(device, seed, target, lead, n, k, dtype, bias_dtype, layout):
    draw = Draw(device, seed)
    a, scale_a, global_a = nvfp4(draw, *lead, k, layout=layout)
    b, scale_b, global_b = nvfp4(draw, n, k, layout=layout)
    scales, bias = (scale_a, scale_b, global_a, global_b), draw.bias(n, bias_dtype)
    y = launch.nvfp4_gemm(a, b, *scales, bias, NAMES[dtype], target=target)
    x, w = (
        numerics.dequantize_nvfp4(a, scale_a, global_a),
        numerics.dequantize_nvfp4(b, scale_b, global_b),
    )
    assert_product(y, x, w, bias, dtype)


@settings(max_examples=25)
@given(seeds, all_targets, leads, columns, mxfp8_inner, floats, biases, layouts)
def test_mxfp8_gemm(device, seed, target, lead, n, k, dtype, bias_dtype, layout):
    draw = Draw(device, seed)
    a, scale_a = mxfp8(draw, *lead, k, layout=layout)
    b, scale_b = mxfp8(draw, n, k, layout=layout)
    bias = draw.bias(n, bias_dtype)
    y = launch.mxfp8_gemm(a, b, scale_a, scale_b, bias, NAMES[dtype], target=target)
    x, w = numerics.dequantize_mxfp8(a, scale_a), numerics.dequantize_mxfp8(b, scale_b)
    assert_product(y, x, w, bias, dtype)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize(("m", "n", "k"), [(131, 200, 544), (130, 129, 512), (20, 150, 544)])
def test_scales_in_the_order_of_the_matrix_units_are_the_same_scales(device, format, m, n, k):
    # Tiles of 128 rows or more: every scale of every row and column has to find its place.
    draw = Draw(device, 3)
    if format == "nvfp4":
        (a, scale_a, global_a), (b, scale_b, global_b) = nvfp4(draw, m, k), nvfp4(draw, n, k)
        scales = (scale_a, scale_b, global_a, global_b)
        x = numerics.dequantize_nvfp4(a, scale_a, global_a)
        w = numerics.dequantize_nvfp4(b, scale_b, global_b)
        multiply = launch.nvfp4_gemm
    else:
        (a, scale_a), (b, scale_b) = mxfp8(draw, m, k), mxfp8(draw, n, k)
        scales = (scale_a, scale_b)
        x, w = numerics.dequantize_mxfp8(a, scale_a), numerics.dequantize_mxfp8(b, scale_b)
        multiply = launch.mxfp8_gemm
    y = multiply(a, b, *scales, None, NAMES[FP32], target=SM_100)
    assert_product(y, x, w, None, FP32)


@settings(max_examples=25)
@given(seeds, all_targets, leads, columns, nvfp4_inner, floats, biases, layouts)
def test_nvfp4_weight_only_gemm(device, seed, target, lead, n, k, dtype, bias_dtype, layout):
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), layout)
    weight, bias = nvfp4(draw, n, k, layout=layout), draw.bias(n, bias_dtype)
    y = launch.nvfp4_weight_only_gemm(x, *weight, bias, target=target)
    assert_product(y, x.float(), numerics.dequantize_nvfp4(*weight), bias, dtype)


@settings(max_examples=25)
@given(seeds, all_targets, leads, columns, mxfp8_inner, floats, biases, layouts)
def test_mxfp8_weight_only_gemm(device, seed, target, lead, n, k, dtype, bias_dtype, layout):
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), layout)
    weight, bias = mxfp8(draw, n, k, layout=layout), draw.bias(n, bias_dtype)
    y = launch.mxfp8_weight_only_gemm(x, *weight, bias, target=target)
    assert_product(y, x.float(), numerics.dequantize_mxfp8(*weight), bias, dtype)


@settings(max_examples=12)
@given(seeds, all_targets, leads, columns, nvfp4_inner, floats, biases, st.sampled_from([1, 2]))
def test_one_global_scale_for_each_row_of_an_nvfp4_weight(
    device, seed, target, lead, n, k, dtype, bias_dtype, step
):
    draw = Draw(device, seed)
    b, scale_b, _ = nvfp4(draw, n, k)
    a, scale_a, global_a = nvfp4(draw, *lead, k)
    rows, bias = draw.scale(step * n)[::step], draw.bias(n, bias_dtype)
    w = numerics.dequantize_nvfp4(b, scale_b, rows[:, None])
    y = launch.nvfp4_gemm(a, b, scale_a, scale_b, global_a, rows, bias, NAMES[dtype], target=target)
    x = numerics.dequantize_nvfp4(a, scale_a, global_a)
    assert_product(y, x, w, bias, dtype)
    # The same product in two operators: activations without their global scale, which comes last.
    one = torch.ones((), device=device)
    values = numerics.dequantize_nvfp4(a, scale_a, one, BF16)
    tail = (rows, bias, 0, global_a, NAMES[dtype])
    y = launch.nvfp4_weight_only_gemm(values, b, scale_b, *tail, target=target)
    assert_product(y, x, w, bias, dtype)
    # And in one.
    x = draw.normal(*lead, k, dtype=dtype)
    y = launch.nvfp4_linear(x, b, scale_b, rows, global_a, bias, target=target)
    codes = numerics.quantize_nvfp4(x, global_a)
    assert_product(y, numerics.dequantize_nvfp4(*codes, global_a), w, bias, dtype)


@settings(max_examples=8)
@given(seeds, all_targets, leads, mxfp8_inner, floats, floats)
def test_mxfp8_weight_only_gemm_returns_the_dtype_that_is_asked_for(
    device, seed, target, lead, k, dtype, out_dtype
):
    draw = Draw(device, seed)
    x, weight = draw.normal(*lead, k, dtype=dtype), mxfp8(draw, 7, k)
    tail = (None, 0, NAMES[out_dtype])
    y = launch.mxfp8_weight_only_gemm(x, *weight, *tail, target=target)
    assert_product(y, x.float(), numerics.dequantize_mxfp8(*weight), None, out_dtype)


@every_target
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=lambda dtype: NAMES[dtype])
def test_every_nvfp4_weight_is_decoded_exactly(device, target, dtype):
    # x is a unit matrix: the product is the weight. All 16 codes meet all 127 block scales that a
    # checkpoint can hold, in fp32 so that nothing is rounded.
    scale = torch.arange(127, dtype=torch.uint8, device=device).view(FP8)[:, None]
    codes = torch.arange(16, dtype=torch.uint8, device=device).expand(127, 16)
    packed = numerics.pack_nibbles(codes)
    one = torch.ones((), device=device)
    x = torch.eye(16, dtype=dtype, device=device)
    y = launch.nvfp4_weight_only_gemm(x, packed, scale, one, target=target)
    exact = numerics.dequantize_nvfp4(packed, scale, one)
    # + 0: a sum that starts at 0 does not keep the sign of a zero.
    assert_same_bits(y, exact.T.to(dtype) + 0)


@every_target
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=lambda dtype: NAMES[dtype])
def test_every_mxfp8_weight_of_the_normal_range_is_decoded_exactly(device, target, dtype):
    # Exponents for which every product of a code is a normal bf16: the smallest code is 2 ** -9.
    exponents = torch.arange(10, 246, dtype=torch.uint8, device=device)[:, None]
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    codes = codes[(codes & 0x7F) != 0x7F]
    codes = torch.cat([codes, codes[:2]]).view(8, 32)
    x = torch.eye(32, dtype=dtype, device=device)
    for row in codes.view(FP8):
        weight = row.expand(236, 32).contiguous()
        y = launch.mxfp8_weight_only_gemm(x, weight, exponents, target=target)
        exact = numerics.dequantize_mxfp8(weight, exponents)
        assert_same_bits(y, exact.T.to(dtype) + 0)


@every_target
def test_an_nvfp4_block_scale_of_nan_reaches_its_row(device, target):
    draw, (m, n, k) = Draw(device, 1), (4, 70, 160)
    weight, scale, global_scale = nvfp4(draw, n, k)
    scale.view(torch.uint8)[69, 9] = 0x7F
    x = draw.normal(m, k, dtype=BF16)
    y = launch.nvfp4_weight_only_gemm(x, weight, scale, global_scale, target=target)
    wanted = torch.zeros(m, n, dtype=torch.bool, device=device)
    wanted[:, 69] = True
    assert torch.equal(y.isnan(), wanted)


@every_target
def test_an_mxfp8_exponent_of_nan_reaches_its_row(device, target):
    draw, (m, n, k) = Draw(device, 2), (4, 70, 160)
    weight, exponents = mxfp8(draw, n, k)
    exponents[69, 4] = 255
    x = draw.normal(m, k, dtype=BF16)
    y = launch.mxfp8_weight_only_gemm(x, weight, exponents, target=target)
    wanted = torch.zeros(m, n, dtype=torch.bool, device=device)
    wanted[:, 69] = True
    assert torch.equal(y.isnan(), wanted)


@every_target
@pytest.mark.parametrize("quantized", [False, True], ids=["weight-only", "both"])
def test_a_fused_nvfp4_group_equals_its_members_to_the_bit(device, target, quantized):
    target, draw = few_processors(target), Draw(device, 3)
    m, members = 5, (128, 384, 512)
    n = sum(members)
    native = quantized and target.has_nvfp4_dot
    kind = Kind.NVFP4 if native else Kind.HALF_NVFP4
    k = inner_of_two_splits(kind, m, target)
    group, alone = (choose(kind, m, size, k, target).split_k for size in (n, members[0]))
    assert group != alone, "a member alone adds in the same order anyway: nothing is tested"
    b, scale_b, global_b = nvfp4(draw, n, k)
    a, scale_a, global_a = nvfp4(draw, m, k)
    x = draw.normal(m, k, dtype=BF16)

    def product(rows: slice, plan_n: int) -> torch.Tensor:
        if not quantized:
            weight = (b[rows], scale_b[rows], global_b)
            return launch.nvfp4_weight_only_gemm(x, *weight, None, plan_n, target=target)
        scales = (scale_a, scale_b[rows], global_a, global_b)
        return launch.nvfp4_gemm(a, b[rows], *scales, None, "float32", plan_n, target=target)

    fused, start = product(slice(0, n), 0), 0
    for size in members:
        rows = slice(start, start + size)
        assert_same_bits(product(rows, n), fused[:, rows].contiguous())
        start += size


def inner_of_two_splits(kind: Kind, m: int, target: Target) -> int:
    """A K, a multiple of 32 but not of a K step, that is just long enough to be split."""
    blocks = 2 * BLOCKS_PER_SPLIT * choose(kind, m, 64, 64, target).block_k
    return max(blocks, 32 * bucket(m)) + 32


@settings(max_examples=8)
@given(seeds, targets, st.sampled_from([1, 20]), floats)
def test_split_k(device, seed, target, m, dtype):
    draw, n = Draw(device, seed), 50
    kind = Kind.FP32 if dtype == FP32 else Kind.HALF_NVFP4
    k = inner_of_two_splits(kind, m, target)
    assert choose(kind, m, n, k, target).split_k > 1
    x = draw.normal(m, k, dtype=dtype)
    weight, bias = nvfp4(draw, n, k), draw.bias(n, BF16)
    y = launch.nvfp4_weight_only_gemm(x, *weight, bias, target=target)
    assert_product(y, x.float(), numerics.dequantize_nvfp4(*weight), bias, dtype)
    weight = mxfp8(draw, n, k)
    y = launch.mxfp8_weight_only_gemm(x, *weight, bias, target=target)
    assert_product(y, x.float(), numerics.dequantize_mxfp8(*weight), bias, dtype)


@every_target
def test_many_rows(device, target):
    draw, (m, n, k) = Draw(device, 4), (520, 140, 144)
    x, weight = draw.normal(m, k, dtype=BF16), nvfp4(draw, n, k)
    y = launch.nvfp4_weight_only_gemm(x, *weight, target=target)
    assert_product(y, x.float(), numerics.dequantize_nvfp4(*weight), None, BF16)
    a, scale_a = mxfp8(draw, m, 160)
    b, scale_b = mxfp8(draw, n, 160)
    y = launch.mxfp8_gemm(a, b, scale_a, scale_b, target=target)
    x, w = numerics.dequantize_mxfp8(a, scale_a), numerics.dequantize_mxfp8(b, scale_b)
    assert_product(y, x, w, None, BF16)
