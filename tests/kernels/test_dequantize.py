"""The dequantize launchers against mokernels.numerics, bit for bit, on all targets."""

from __future__ import annotations

import pytest
import torch

from mokernels import numerics
from mokernels.ops.launch import quantize as launch
from tests.kernels.activations import (
    draws,
    every_target,
    normal,
    scalar,
    targets,
)
from tests.support.compare import assert_same_bits


def all_codes(rows: int, k: int, device: torch.device) -> torch.Tensor:
    """Bytes [rows, k] that hold every code."""
    return (
        (torch.arange(rows * k, dtype=torch.int32) % 256).to(torch.uint8).view(rows, k).to(device)
    )


@every_target
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("granularity", ["tensor", "one", "token", "block", "square"])
def test_dequantize_fp8(device, target, out_dtype, granularity):
    codes = all_codes(200, 300, device).view(torch.float8_e4m3fn)
    shapes = {"tensor": (), "one": (1,), "token": (200,), "block": (200, 3), "square": (2, 3)}
    scale = normal(*shapes[granularity], seed=3, dtype=torch.float32).to(device)
    result = launch.dequantize_fp8(codes, scale, out_dtype, target=target)
    expected = numerics.dequantize_fp8(codes, scale, getattr(torch, out_dtype))
    assert_same_bits(result, expected)


def test_dequantize_fp8_keeps_leading_dimensions(device):
    codes = all_codes(6, 256, device).view(torch.float8_e4m3fn).view(2, 3, 256)
    for shape in ((), (2, 3), (2, 3, 2)):
        scale = normal(*shape, seed=4, dtype=torch.float32).to(device)
        for name in ("dequantize_fp8", "dequantize_fp8_per_token", "dequantize_fp8_per_block"):
            result = getattr(launch, name)(codes, scale, target=targets()[0])
            assert_same_bits(result, numerics.dequantize_fp8(codes, scale, torch.bfloat16))
    row = codes[0, 0]
    scale = normal(2, seed=5, dtype=torch.float32).to(device)
    result = launch.dequantize_fp8(row, scale, "float32", target=targets()[0])
    assert_same_bits(result, numerics.dequantize_fp8(row, scale))


@every_target
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_dequantize_nvfp4(device, target, out_dtype):
    codes = all_codes(64, 48, device)
    scale = all_codes(64, 6, device).view(torch.float8_e4m3fn)
    g = scalar(0.0123, device)
    result = launch.dequantize_nvfp4(codes, scale, g, out_dtype, target=target)
    expected = numerics.dequantize_nvfp4(codes, scale, g, getattr(torch, out_dtype))
    assert_same_bits(result, expected)


@every_target
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_dequantize_mxfp8(device, target, out_dtype):
    codes = all_codes(256, 64, device).view(torch.float8_e4m3fn)
    exponents = all_codes(2, 256, device).view(256, 2)
    result = launch.dequantize_mxfp8(codes, exponents, out_dtype, target=target)
    expected = numerics.dequantize_mxfp8(codes, exponents, getattr(torch, out_dtype))
    assert_same_bits(result, expected)


@draws(multiple=16)
def test_dequantize_takes_any_strides(device, data, g):
    codes = data.to(device).to(torch.float8_e4m3fn)
    expected = numerics.dequantize_fp8(codes.contiguous(), scalar(g, device), torch.bfloat16)
    result = launch.dequantize_fp8(codes, scalar(g, device), target=targets()[0])
    assert_same_bits(result, expected)
