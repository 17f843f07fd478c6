"""Linear operators: the quantized activations of the definition, times the dequantized weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mokernels import numerics
from mokernels.ops import launch
from mokernels.ops.target import Target
from tests.kernels.products import (
    BF16,
    FP16,
    FP32,
    TARGETS,
    Draw,
    assert_product,
    biases,
    columns,
    floats,
    layouts,
    leads,
    restride,
    seeds,
    targets,
)

inner = st.sampled_from([32, 96, 256, 288])
weight_scales = st.sampled_from(["scalar", "per channel", "128x128"])
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def fp8_weight(draw: Draw, kind: str, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    shapes = {"scalar": (), "per channel": (n,), "128x128": (-(-n // 128), -(-k // 128))}
    return draw.e4m3(n, k), draw.scale(*shapes[kind])


@settings(max_examples=25)
@given(seeds, targets, leads, columns, inner, weight_scales, floats, biases, layouts, st.booleans())
def test_fp8_linear(
    device, seed, target, lead, n, k, kind, dtype, bias_dtype, layout, has_multiplier
):  # fmt: skip
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), layout)
    (weight, scale), bias = fp8_weight(draw, kind, n, k), draw.bias(n, bias_dtype)
    input_scale = draw.scale()
    multiplier, inverse = numerics.static_fp8_scales(input_scale)
    given_scales = (inverse, bias, multiplier) if has_multiplier else (input_scale, bias, None)
    y = launch.fp8_linear(x, weight, scale, *given_scales, target=target)
    values = numerics.dequantize_fp8(numerics.quantize_fp8(x, multiplier), inverse)
    assert_product(y, values, numerics.dequantize_fp8(weight, scale), bias, dtype, native_fp8=True)


@settings(max_examples=25)
@given(seeds, targets, leads, columns, inner, weight_scales, floats, biases, layouts, st.booleans())
def test_fp8_dynamic_linear(
    device, seed, target, lead, n, k, kind, dtype, bias_dtype, layout, per_block
):  # fmt: skip
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), layout)
    (weight, scale), bias = fp8_weight(draw, kind, n, k), draw.bias(n, bias_dtype)
    linear = launch.fp8_block_linear if per_block else launch.fp8_per_token_linear
    y = linear(x, weight, scale, bias, target=target)
    quantize = numerics.quantize_fp8_per_block if per_block else numerics.quantize_fp8_per_token
    values = numerics.dequantize_fp8(*quantize(x))
    assert_product(y, values, numerics.dequantize_fp8(weight, scale), bias, dtype, native_fp8=True)


@settings(max_examples=25)
@given(seeds, targets, leads, columns, inner, floats, biases, layouts)
def test_nvfp4_linear(device, seed, target, lead, n, k, dtype, bias_dtype, layout):
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), layout)
    weight = (draw.packed(n, k // 2), draw.block_scale(n, k // 16), draw.scale())
    input_scale, bias = draw.scale() * 2.0**-4, draw.bias(n, bias_dtype)
    y = launch.nvfp4_linear(x, *weight, input_scale, bias, target=target)
    values = numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(x, input_scale), input_scale)
    assert_product(y, values, numerics.dequantize_nvfp4(*weight), bias, dtype)


@settings(max_examples=25)
@given(seeds, targets, leads, columns, inner, floats, biases, layouts)
def test_mxfp8_linear(device, seed, target, lead, n, k, dtype, bias_dtype, layout):
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), layout)
    weight, bias = (draw.e4m3(n, k), draw.exponents(n, k // 32)), draw.bias(n, bias_dtype)
    y = launch.mxfp8_linear(x, *weight, bias, target=target)
    values = numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x))
    assert_product(y, values, numerics.dequantize_mxfp8(*weight), bias, dtype)


@every_target
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_nan_token_gives_a_nan_row_and_no_other(device, target, dtype):
    draw, (m, n, k) = Draw(device, 1), (4, 20, 64)
    x = draw.normal(m, k, dtype=dtype)
    x[2, 33] = float("nan")
    results = all_linears(draw, x, n, k, target)
    for name, y in results.items():
        assert y.isnan().all(-1).tolist() == [False, False, True, False], name
        assert y.isnan().any(-1).tolist() == [False, False, True, False], name


def all_linears(
    draw: Draw, x: torch.Tensor, n: int, k: int, target: Target
) -> dict[str, torch.Tensor]:
    """Every linear operator on the same activations, by name."""
    fp8 = (draw.e4m3(n, k), draw.scale())
    nvfp4 = (draw.packed(n, k // 2), draw.block_scale(n, k // 16), draw.scale(), draw.scale())
    mxfp8 = (draw.e4m3(n, k), draw.exponents(n, k // 32))
    return {
        "fp8": launch.fp8_linear(x, *fp8, draw.scale(), target=target),
        "fp8_per_token": launch.fp8_per_token_linear(x, *fp8, target=target),
        "fp8_block": launch.fp8_block_linear(x, *fp8, target=target),
        "nvfp4": launch.nvfp4_linear(x, *nvfp4, target=target),
        "mxfp8": launch.mxfp8_linear(x, *mxfp8, target=target),
    }


def test_the_launchers_are_those_of_the_operators():
    names = ("fp8_linear", "fp8_per_token_linear", "fp8_block_linear", "nvfp4_linear")
    names += ("mxfp8_linear", "fp8_gemm", "nvfp4_gemm", "mxfp8_gemm", "fp8_weight_only_gemm")
    names += ("nvfp4_weight_only_gemm", "mxfp8_weight_only_gemm")
    for name in names:
        schema = getattr(torch.ops.mokernels, name).default._schema
        wanted = [argument.name for argument in schema.arguments]
        code = getattr(launch, name).__code__
        assert list(code.co_varnames[: code.co_argcount]) == wanted, name
        assert "target" in code.co_varnames
