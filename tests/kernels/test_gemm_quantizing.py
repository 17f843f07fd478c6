"""FP8 products that quantize their activations themselves: the bits of quantizing first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mokernels import numerics
from mokernels.ops import launch
from mokernels.ops.launch.linear import (
    plan_fp8_block_linear,
    plan_fp8_linear,
    plan_fp8_per_token_linear,
)
from mokernels.ops.quantizing import TOKEN_ROWS_IN_GEMM
from mokernels.ops.target import GFX942, GFX950, SM_80, SM_90, Target
from tests.kernels.activations import hard_rows
from tests.kernels.products import (
    BF16,
    FP16,
    FP32,
    TARGETS,
    Draw,
    biases,
    columns,
    few_processors,
    floats,
    layouts,
    restride,
    seeds,
)
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting

NAMES = {BF16: "bfloat16", FP16: "float16", FP32: "float32"}
QUANTIZING = [t for t in (*TARGETS, *([GFX950] if interpreting() else [])) if t.has_fp8_dot]
targets = st.sampled_from(QUANTIZING)
every_target = pytest.mark.parametrize("target", QUANTIZING, ids=lambda target: target.name)
HOWS = ("static", "token", "block")
BLOCKS = [target for target in QUANTIZING if target.backend == "cuda"]
"""Targets whose steps along K are 128 long, the length of a block."""
hows = st.sampled_from(HOWS)
every_how = pytest.mark.parametrize("how", HOWS)
tokens = st.sampled_from([(1,), (2,), (16,), (2, 5), (1, 1, 3)])
inner = st.sampled_from([1, 40, 128, 130, 256, 300, 1000])


def names(planned: tuple) -> list[str]:
    return [one.kernel.__name__ for one in planned[1]]


def fused(
    how: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, target: Target
) -> Tensor:
    """In the GEMM's own launch, which is checked."""
    if how == "block":
        if target not in BLOCKS:
            return in_two(how, x, weight, scale, bias, target)
        arguments = (x, weight, scale, bias)
        planned, linear = plan_fp8_block_linear(*arguments, target=target), launch.fp8_block_linear
    elif how == "static":
        multiplier, divisor = numerics.static_fp8_scales(input_scale(x))
        pair = (x, weight, scale, divisor, bias, multiplier)
        planned, linear = plan_fp8_linear(*pair, target=target), launch.fp8_linear
        # The scale as it is stored: the pair comes from a launch before.
        arguments = (x, weight, scale, input_scale(x), bias, None)
        computed = plan_fp8_linear(*arguments, target=target)
        assert names(computed) == ["static_scales", *names(planned)]
    else:
        arguments = (x, weight, scale, bias)
        planned, linear = (
            plan_fp8_per_token_linear(*arguments, target=target),
            launch.fp8_per_token_linear,
        )
    assert names(planned)[0] == ("gemm_block" if how == "block" else "gemm_quantizing")
    assert len(planned[1]) == 1 or planned[1][0].constants["SPLIT"] == "parts"
    return linear(*arguments, target=target)


def in_two(
    how: str, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, target: Target
) -> Tensor:
    """Quantized first."""
    if how == "static":
        multiplier, x_scale = numerics.static_fp8_scales(input_scale(x))
        codes = launch.quantize_fp8(x, x_scale, multiplier, target=target)
    elif how == "token":
        codes, x_scale = launch.quantize_fp8_per_token(x, target=target)
    else:
        codes, x_scale = launch.quantize_fp8_per_block(x, target=target)
    return launch.fp8_gemm(codes, weight, x_scale, scale, bias, NAMES[x.dtype], target=target)


def input_scale(x: Tensor) -> Tensor:
    """For values of a normal distribution: the largest ones saturate."""
    return torch.tensor(2.0 / 448, device=x.device)


@settings(max_examples=40)
@given(seeds, targets, hows, tokens, columns, inner, st.integers(0, 2), floats, biases, layouts)
def test_the_bits_are_those_of_quantizing_first(
    device, seed, target, how, lead, n, k, rank, dtype, bias_dtype, layout
):  # fmt: skip
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), layout)
    weight, bias = restride(draw.e4m3(n, k), layout), draw.bias(n, bias_dtype)
    shapes = ((), (n,), (-(-n // 128), -(-k // 128)) if how == "block" else (n,))
    operands = (x, weight, draw.scale(*shapes[rank]), bias)
    assert_same_bits(fused(how, *operands, target), in_two(how, *operands, target))


@every_target
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("m", [17, 32])
def test_more_rows_with_one_scale(device, target, dtype, m):
    draw = Draw(device, m)
    operands = (draw.normal(m, 300, dtype=dtype), draw.e4m3(140, 300), draw.scale(140), None)
    assert_same_bits(fused("static", *operands, target), in_two("static", *operands, target))


@every_target
@every_how
@pytest.mark.parametrize("k", [1024, 990])
def test_split_k(device, target, how, k):
    # Two columns of tiles and several parts of K, which the last program of a tile adds.
    draw, target = Draw(device, k), few_processors(target)
    operands = (
        draw.normal(9, k, dtype=BF16),
        draw.e4m3(70, k),
        draw.scale(70),
        draw.bias(70, BF16),
    )
    planned = plan_fp8_per_token_linear(*operands, target=target)
    assert names(planned)[1:] == ([] if target.backend == "cuda" else ["reduce_splits"])
    assert planned[1][0].constants["SPLIT"] is not None
    assert_same_bits(fused(how, *operands, target), in_two(how, *operands, target))


@every_target
@every_how
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("k", [250, 256])
def test_rows_of_extremes(device, target, how, dtype, k):
    # Zeros, subnormals, overflows, infinities and NaN, each in a row of its own.
    x = hard_rows()[:, :k].to(dtype).to(device)
    draw = Draw(device, 3)
    operands = (x, draw.normal(20, k).to(torch.float8_e4m3fn), draw.scale(20), None)
    result = fused(how, *operands, target)
    assert_same_bits(result, in_two(how, *operands, target))
    assert result[x.isnan().any(-1)].isnan().all()


@every_target
def test_an_infinite_multiplier_makes_no_nan_beyond_k(device, target):
    draw, one = Draw(device, 4), torch.ones((), device=device)
    x, weight = draw.normal(3, 130, dtype=BF16), draw.e4m3(20, 130)
    arguments = (x, weight, one, one, None, one * torch.inf)
    result = launch.fp8_linear(*arguments, target=target)
    codes = launch.quantize_fp8(x, one, one * torch.inf, target=target)
    assert_same_bits(result, launch.fp8_gemm(codes, weight, one, one, target=target))
    assert result.isfinite().all()


@every_target
@every_how
def test_a_slice_of_every_sequence_is_read_in_place(device, target, how):
    draw = Draw(device, 5)
    x = draw.normal(3, 4, 96, dtype=BF16)[:, -1:]
    operands = (x, draw.e4m3(20, 96), draw.scale(20), None)
    assert_same_bits(fused(how, *operands, target), in_two(how, *operands, target))


@every_target
def test_where_quantizing_first_is_better(device, target):
    draw = Draw(device, 6)
    per_token = lambda x, scale: names(  # noqa: E731
        plan_fp8_per_token_linear(x, draw.e4m3(128, x.shape[-1]), scale, None, target=target)
    )[0]
    one, x = draw.scale(), draw.normal(2, 128, dtype=BF16)
    assert per_token(x, one) == "gemm_quantizing"
    assert per_token(x, draw.scale(1, 1)) == "quantize_rows"  # scales of blocks
    many = draw.normal(TOKEN_ROWS_IN_GEMM + 1, 128, dtype=BF16)
    assert per_token(many, one) == "quantize_rows"
    nested = draw.normal(2, 4, 128, dtype=BF16)[:, :2]
    assert per_token(nested, one) == "quantize_rows"


def test_targets_without_fp8_instructions_quantize_first():
    x = torch.empty(1, 128, dtype=BF16, device="meta")
    weight = torch.empty(64, 128, dtype=torch.float8_e4m3fn, device="meta")
    one = torch.empty((), device="meta")
    for target in (SM_80, GFX942):
        planned = plan_fp8_per_token_linear(x, weight, one, None, target=target)
        assert names(planned) == ["quantize_rows", "gemm_epilogue"]
        planned = plan_fp8_linear(x, weight, one, one, None, one, target=target)
        assert names(planned) == ["quantize_static", "gemm_epilogue"]


@every_how
def test_a_fused_group_equals_its_members_to_the_bit(device, how):
    target, draw = replace(SM_90, processors=2), Draw(device, 7)
    if not interpreting():
        pytest.skip("plans for another number of processors than the device has")
    x, weight, scale = draw.normal(5, 1000, dtype=BF16), draw.e4m3(512, 1000), draw.scale(512)
    whole = fused(how, x, weight, scale, None, target)
    for rows in (slice(0, 128), slice(128, 512)):
        if how == "block":
            operands = (x, weight[rows], scale[rows], None, 512)
            member = launch.fp8_block_linear(*operands, target=target)
        elif how == "static":
            part = (weight[rows], scale[rows], input_scale(x), None, None, 512)
            member = launch.fp8_linear(x, *part, target=target)
        else:
            member = launch.fp8_per_token_linear(
                x, weight[rows], scale[rows], None, 512, target=target
            )
        assert_same_bits(member, whole[:, rows].contiguous())
