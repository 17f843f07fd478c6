"""NVFP4 and MXFP8 products that quantize their one row themselves: the bits of quantizing first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mokernels.ops import launch
from mokernels.ops.launch.linear import plan_mxfp8_linear, plan_nvfp4_linear
from mokernels.ops.launch.plan import run
from mokernels.ops.launch.quantize import plan_fake_quantize_mxfp8, plan_fake_quantize_nvfp4
from mokernels.ops.target import Target
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

DECODING = [target for target in TARGETS if not target.has_nvfp4_dot]
pytestmark = pytest.mark.skipif(
    not DECODING, reason="this device's matrix units apply block scales: it takes codes"
)
FORMATS = ("nvfp4", "mxfp8")
NAMES = {BF16: "bfloat16", FP16: "float16", FP32: "float32"}
every_format = pytest.mark.parametrize("name", FORMATS)
every_target = pytest.mark.parametrize("target", DECODING, ids=lambda target: target.name)
one_row = st.sampled_from([(), (1,), (1, 1, 1)])
inner = st.sampled_from([32, 96, 128, 256, 288, 1120])


def operands(draw: Draw, name: str, n: int, k: int) -> tuple[Tensor, ...]:
    """Of the linear operators, without activations and bias."""
    if name == "mxfp8":
        return draw.e4m3(n, k), draw.exponents(n, k // 32)
    scales = (draw.block_scale(n, k // 16), draw.scale(), draw.scale() * 2.0**-4)
    return draw.packed(n, k // 2), *scales


def fused(
    name: str, x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, target: Target
) -> Tensor:
    """In one launch, which is checked."""
    plan = plan_nvfp4_linear if name == "nvfp4" else plan_mxfp8_linear
    planned = plan(x, *weight, bias, target=target)
    kernels = [one.kernel.__name__ for one in planned[1]]
    assert kernels == ["gemm_decode"]
    assert planned[1][0].constants["QUANTIZE"]
    return run((planned[0].fill_(float("nan")), planned[1]))


def in_two(
    name: str, x: Tensor, weight: tuple[Tensor, ...], bias: Tensor | None, target: Target
) -> Tensor:
    """Quantized and decoded first."""
    dtype = NAMES[x.dtype]
    if name == "mxfp8":
        values = run(plan_fake_quantize_mxfp8(x, BF16, target=target))
        return launch.mxfp8_weight_only_gemm(values, *weight, bias, out_dtype=dtype, target=target)
    *weight, input_scale = weight
    values = run(plan_fake_quantize_nvfp4(x, input_scale, BF16, target=target))
    return launch.nvfp4_weight_only_gemm(
        values, *weight, bias, global_scale_a=input_scale, out_dtype=dtype, target=target
    )


@settings(max_examples=30)
@given(
    seeds, st.sampled_from(DECODING or [None]), one_row, columns, inner, st.sampled_from(FORMATS),
    floats, biases, layouts,
)  # fmt: skip
def test_the_bits_are_those_of_quantizing_first(
    device, seed, target, lead, n, k, name, dtype, bias_dtype, layout
):  # fmt: skip
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), layout)
    weight, bias = operands(draw, name, n, k), draw.bias(n, bias_dtype)
    arguments = (name, x, weight, bias, target)
    assert_same_bits(fused(*arguments), in_two(*arguments))


@every_target
@every_format
@pytest.mark.parametrize("k", [1024, 1120])
def test_split_k(device, target, name, k):
    draw, target = Draw(device, k), few_processors(target)
    arguments = (name, draw.normal(1, k, dtype=BF16), operands(draw, name, 70, k), None, target)
    plan = plan_nvfp4_linear if name == "nvfp4" else plan_mxfp8_linear
    (planned,) = plan(*arguments[1:2], *arguments[2], None, target=target)[1]
    assert planned.constants["SPLIT"] == "last"
    assert_same_bits(fused(*arguments), in_two(*arguments))


@every_target
@every_format
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("special", [0.0, 2.0**-30, float("inf"), float("nan"), 60000.0])
def test_blocks_of_extremes(device, target, name, dtype, special):
    # One block of them, between others; what follows K in memory must not be read as a block.
    draw = Draw(device, 7)
    x = draw.normal(1, 160, dtype=dtype)
    x[:, 32:64] = special
    wide = torch.cat([x, x.new_full((1, 96), 3.0)], dim=1)[:, :160]
    arguments = (name, wide, operands(draw, name, 65, 160), None, target)
    assert_same_bits(fused(*arguments), in_two(*arguments))


@every_target
@every_format
def test_two_rows_are_quantized_first(device, target, name):
    draw = Draw(device, 3)
    plan = plan_nvfp4_linear if name == "nvfp4" else plan_mxfp8_linear
    _, launches = plan(draw.normal(2, 64), *operands(draw, name, 64, 64), None, target=target)
    assert [one.kernel.__name__ for one in launches][:2] == ["quantize_blocks", "gemm_decode"]
