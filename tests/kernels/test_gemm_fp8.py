"""FP8 GEMMs, weights with and without FP8 activations, against exact products."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mokernels import numerics
from mokernels.ops import launch
from mokernels.ops.configs import Kind, choose
from mokernels.ops.target import HIP_TARGETS
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
inner = st.sampled_from([1, 16, 40, 128, 130, 256, 300])
a_scales = st.sampled_from(["scalar", "vector of one", "per token", "1x128"])
b_scales = st.sampled_from(["scalar", "vector of one", "per channel", "128x128"])
ALL_TARGETS = (*TARGETS, *HIP_TARGETS) if interpreting() else TARGETS
all_targets = st.sampled_from(ALL_TARGETS)
every_target = pytest.mark.parametrize("target", ALL_TARGETS, ids=lambda target: target.name)


def a_scale(draw: Draw, kind: str, lead: tuple[int, ...], k: int) -> torch.Tensor:
    blocks = -(-k // 128)
    if kind == "1x128":
        # M-major, as other libraries' quantizers write it.
        return draw.scale(blocks, *lead).movedim(0, -1)
    return draw.scale(*{"scalar": (), "vector of one": (1,), "per token": lead}[kind])


def b_scale(draw: Draw, kind: str, n: int, k: int) -> torch.Tensor:
    if kind == "per channel":
        return draw.scale(3 * n)[::3]
    shapes = {"scalar": (), "vector of one": (1,), "128x128": (-(-n // 128), -(-k // 128))}
    return draw.scale(*shapes[kind])


@settings(max_examples=50)
@given(
    seeds,
    all_targets,
    leads,
    columns,
    inner,
    a_scales,
    b_scales,
    floats,
    biases,
    layouts,
    st.booleans(),
)
def test_fp8_gemm(
    device, seed, target, lead, n, k, a_kind, b_kind, dtype, bias_dtype, layout, fast
):  # fmt: skip
    draw = Draw(device, seed)
    a, b = restride(draw.e4m3(*lead, k), layout), restride(draw.e4m3(n, k), layout)
    scale_a, scale_b = a_scale(draw, a_kind, lead, k), b_scale(draw, b_kind, n, k)
    bias = draw.bias(n, bias_dtype)
    y = launch.fp8_gemm(a, b, scale_a, scale_b, bias, NAMES[dtype], fast, target=target)
    x, w = numerics.dequantize_fp8(a, scale_a), numerics.dequantize_fp8(b, scale_b)
    assert_product(y, x, w, bias, dtype, native_fp8=True)


@settings(max_examples=25)
@given(seeds, all_targets, leads, columns, inner, b_scales, floats, biases, layouts)
def test_fp8_weight_only_gemm(
    device, seed, target, lead, n, k, b_kind, dtype, bias_dtype, layout
):  # fmt: skip
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), layout)
    b, scale_b = restride(draw.e4m3(n, k), layout), b_scale(draw, b_kind, n, k)
    bias = draw.bias(n, bias_dtype)
    y = launch.fp8_weight_only_gemm(x, b, scale_b, bias, target=target)
    assert_product(y, x.float(), numerics.dequantize_fp8(b, scale_b), bias, dtype)


@every_target
@pytest.mark.parametrize("blocks", [False, True], ids=["epilogue", "blocks"])
def test_every_code_by_every_code(device, target, blocks):
    """The products of one activation and one weight, of 256 codes each: exact, but for a 0's sign.

    CDNA 3 multiplies codes of another form, two of which have another meaning.
    """
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8).to(device)
    a = codes.new_zeros(256, 128)
    b = codes.new_zeros(256, 128)
    a[:, 3], b[:, 3] = codes, codes
    one = torch.ones((), device=device)
    scales = (torch.ones(256, 1, device=device), torch.ones(2, 1, device=device))
    y = launch.fp8_gemm(a, b, *(scales if blocks else (one, one)), None, "float32", target=target)
    exact = codes.float()[:, None] * codes.float()[None, :]
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.nan_to_num(), exact.nan_to_num())


@every_target
@pytest.mark.parametrize("blocks", [False, True], ids=["epilogue", "blocks"])
def test_many_rows(device, target, blocks):
    # Two tiles in each direction of the largest configurations, with tails.
    draw, (m, n, k) = Draw(device, 1), (520, 140, 130)
    a, b = draw.e4m3(m, k), draw.e4m3(n, k)
    shapes = ((m, 2), (2, 2)) if blocks else ((m,), (n,))
    scales = [draw.scale(*shape) for shape in shapes]
    y = launch.fp8_gemm(a, b, *scales, None, "float32", target=target)
    operands = (numerics.dequantize_fp8(c, s) for c, s in zip((a, b), scales, strict=True))
    assert_product(y, *operands, native_fp8=True)


@settings(max_examples=12)
@given(seeds, targets, st.sampled_from([1, 5, 40]), st.integers(2048, 2600), biases, st.booleans())
def test_split_k(device, seed, target, m, k, bias_dtype, blocks):
    draw, n = Draw(device, seed), 50
    kind = Kind.FP8_BLOCK if blocks else Kind.FP8
    assert choose(kind, m, n, k, target).split_k > 1
    a, b = draw.e4m3(m, k), draw.e4m3(n, k)
    scale_a = draw.scale(m, -(-k // 128)) if blocks else draw.scale(m)
    scale_b, bias = draw.scale(n), draw.bias(n, bias_dtype)
    y = launch.fp8_gemm(a, b, scale_a, scale_b, bias, "float32", target=target)
    x, w = numerics.dequantize_fp8(a, scale_a), numerics.dequantize_fp8(b, scale_b)
    assert_product(y, x, w, bias, native_fp8=True)


@every_target
@pytest.mark.parametrize("kind", [Kind.FP8, Kind.FP8_BLOCK], ids=lambda kind: kind.value)
def test_a_fused_group_equals_its_members_to_the_bit(device, target, kind):
    target, draw = few_processors(target), Draw(device, 2)
    m, k, members = 5, 1100, (128, 256, 128)
    n, blocks = sum(members), kind is Kind.FP8_BLOCK
    group, alone = (choose(kind, m, size, k, target).split_k for size in (n, members[0]))
    assert group != alone, "a member alone adds in the same order anyway: nothing is tested"
    a, b = draw.normal(m, k).to(FP8), draw.normal(n, k).to(FP8)
    scale_a = draw.scale(m, 9) if blocks else draw.scale(m)
    scale_b = draw.scale(n // 128, 9) if blocks else draw.scale(n)
    bias = draw.bias(n, BF16)
    fused = launch.fp8_gemm(a, b, scale_a, scale_b, bias, "float32", target=target)
    start = 0
    for size in members:
        rows = slice(start, start + size)
        part = slice(start // 128, (start + size) // 128) if blocks else rows
        member = launch.fp8_gemm(
            a, b[rows], scale_a, scale_b[part], bias[rows], "float32", plan_n=n, target=target
        )
        assert_same_bits(member, fused[:, rows].contiguous())
        start += size


@every_target
@pytest.mark.parametrize("k", [256, 1100])
@pytest.mark.parametrize("blocks", [False, True], ids=["epilogue", "blocks"])
def test_small_integers_are_exact(device, target, k, blocks):
    # Every partial sum is an integer below 2 ** 13, exact in any accumulator; scales are powers of
    # two, so that the result has the bits of the reference whatever the order of addition.
    draw, (m, n) = Draw(device, 3), (9, 70)
    a, b = (draw.integers(-2, 2, rows, k).float().to(FP8) for rows in (m, n))
    shapes = ((m, -(-k // 128)), (1, -(-k // 128))) if blocks else ((m,), (n,))
    scales = [torch.exp2(draw.integers(-3, 0, *shape).float()) for shape in shapes]
    y = launch.fp8_gemm(a, b, *scales, None, "float32", target=target)
    operands = [numerics.dequantize_fp8(c, s).double() for c, s in zip((a, b), scales, strict=True)]
    assert_same_bits(y, (operands[0] @ operands[1].T).float())


@every_target
@pytest.mark.parametrize("dtype", [None, BF16, FP32], ids=str)
def test_nan_codes_reach_their_row_and_column_only(device, target, dtype):
    draw, (m, n, k) = Draw(device, 4), (5, 70, 200)
    b = draw.e4m3(n, k)
    b.view(torch.uint8)[66, 199] = 0xFF
    if dtype is None:
        a = draw.e4m3(m, k)
        a.view(torch.uint8)[3, 7] = 0x7F
        y = launch.fp8_gemm(a, b, draw.scale(m), draw.scale(n), target=target)
    else:
        x = draw.normal(m, k, dtype=dtype)
        x[3, 7] = math.nan
        y = launch.fp8_weight_only_gemm(x, b, draw.scale(n), target=target)
    wanted = torch.zeros(m, n, dtype=torch.bool, device=device)
    wanted[3], wanted[:, 66] = True, True
    assert torch.equal(y.isnan(), wanted)


@every_target
def test_no_columns_to_sum_gives_the_bias(device, target):
    bias = Draw(device, 5).normal(20)
    codes = torch.empty(0, device=device, dtype=FP8)
    a, b = codes.view(3, 0), codes.view(20, 0)
    one = torch.ones((), device=device)
    y = launch.fp8_gemm(a, b, one, one, bias, "float32", target=target)
    assert_same_bits(y, bias.expand(3, 20).contiguous())


@every_target
def test_a_row_repeated_by_a_zero_stride(device, target):
    draw = Draw(device, 6)
    x, b, scale = draw.normal(1, 64, dtype=BF16), draw.e4m3(20, 64), draw.scale()
    y = launch.fp8_weight_only_gemm(x.expand(4, 64), b, scale, target=target)
    single = launch.fp8_weight_only_gemm(x, b, scale, target=target)
    assert_same_bits(y, single.expand(4, 20).contiguous())
