"""The quantize and dequantize launchers against mokernels.numerics, bit for bit, on all targets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mokernels import numerics
from mokernels.formats import NVFP4_BLOCK
from mokernels.ops.launch import quantize as launch
from mokernels.ops.launch.plan import run
from mokernels.ops.launch.quantize import plan_static_scales
from mokernels.ops.quantize_configs import LONGEST_ROW
from mokernels.ops.target import SM_80, SM_90, Target
from tests.kernels.activations import (
    all_bf16,
    assert_same_pair,
    draws,
    every_float,
    every_target,
    hard_rows,
    inputs,
    normal,
    scalar,
    targets,
)
from tests.support.compare import assert_same_bits


def check_quantize_fp8(x: torch.Tensor, scale: torch.Tensor, target: Target) -> None:
    multiplier, _ = numerics.static_fp8_scales(scale)
    expected = numerics.quantize_fp8(x, multiplier)
    assert_same_bits(launch.quantize_fp8(x, scale, target=target), expected)
    # With a multiplier the scale is not looked at.
    wrong = torch.zeros(1, device=x.device)
    assert_same_bits(launch.quantize_fp8(x, wrong, multiplier, target=target), expected)


@every_target
@every_float
def test_quantize_fp8(device, target, dtype):
    for x in inputs(dtype):
        check_quantize_fp8(x.to(device), scalar(0.02, device), target)


@pytest.mark.parametrize("scale", [1.0, 2.0**-33, 0.0, -2.0, 1e30, 1e-30, math.inf, math.nan])
def test_quantize_fp8_with_any_scale(device, scale):
    check_quantize_fp8(hard_rows().to(device), scalar(scale, device), targets()[0])


@settings(max_examples=50, deadline=None)
@given(bits=st.integers(-(2**31), 2**31 - 1))
@example(bits=0)
@example(bits=0x7F800000)
@example(bits=0x7FC00000)
@example(bits=1)
def test_the_pair_of_a_static_scale(device, bits):
    scale = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(device)
    pair = run(plan_static_scales(scale))
    for found, expected in zip(pair, numerics.static_fp8_scales(scale), strict=True):
        same = torch.equal(found.view(torch.int32), expected.view(torch.int32))
        assert same or (found.isnan() and expected.isnan())


@every_target
@every_float
def test_quantize_fp8_per_token(device, target, dtype):
    for x in inputs(dtype):
        x = x.to(device)
        result = launch.quantize_fp8_per_token(x, target=target)
        assert_same_pair(result, numerics.quantize_fp8_per_token(x))


@every_target
@every_float
def test_quantize_fp8_per_block(device, target, dtype):
    for x in [*inputs(dtype), normal(5, 130, dtype=dtype)]:
        x = x.to(device)
        result = launch.quantize_fp8_per_block(x, target=target)
        assert_same_pair(result, numerics.quantize_fp8_per_block(x))


@every_target
@every_float
def test_quantize_nvfp4(device, target, dtype):
    g = scalar(0.013, device)
    for x in inputs(dtype):
        x = x.to(device)
        result = launch.quantize_nvfp4(x, g, target=target)
        assert_same_pair(result, numerics.quantize_nvfp4(x, g))


@pytest.mark.parametrize("scale", [1.0, 1 / 2688, 1e-3, 0.0, -1.0, 1e-30, 30.0, 1e38, math.nan])
def test_quantize_nvfp4_with_any_global_scale(device, scale):
    g = scalar(scale, device).reshape(1)
    for x in (hard_rows().to(device), all_bf16(256).to(device)):
        result = launch.quantize_nvfp4(x, g, target=targets()[0])
        assert_same_pair(result, numerics.quantize_nvfp4(x, g))


@every_target
@every_float
def test_quantize_mxfp8(device, target, dtype):
    for x in inputs(dtype):
        x = x.to(device)
        result = launch.quantize_mxfp8(x, target=target)
        assert_same_pair(result, numerics.quantize_mxfp8(x))


def test_nvfp4_threshold_of_tiny_blocks(device):
    # The block scale of amax 6 s is s / g = 1, so that the step is g: just at 1e-5 and on both
    # sides of it. At the threshold itself the block is kept.
    threshold = torch.tensor(1e-5)
    neighbours = (threshold.view(torch.int32) + torch.arange(-1, 2)).to(torch.int32)
    for g, kept in zip(neighbours.view(torch.float32), (False, True, True), strict=True):
        x = torch.full((1, 16), 6.0) * g
        codes, scale = launch.quantize_nvfp4(x.to(device), g.to(device), target=targets()[0])
        assert_same_pair((codes, scale), numerics.quantize_nvfp4(x.to(device), g.to(device)))
        assert bool(scale.float().item()) == kept


def test_nvfp4_quotients_next_to_every_tie(device):
    # x = bound * step, and two fp32 steps to both sides of it, for steps with full mantissas: the
    # quotients round to the bound itself or to one of its neighbours.
    bounds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    normal_scales = torch.arange(8, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        g = (torch.rand((), generator=generator) + 0.5) * 2.0 ** (3 * seed - 9)
        step = normal_scales * g
        ties = (bounds * step[:, None]).view(torch.int32)
        x = torch.cat([(ties + offset).view(torch.float32) for offset in (-2, -1, 0, 1, 2)], dim=1)
        x = torch.cat([x, -x[:, :12], step[:, None] * 6], dim=1).to(device)  # [blocks, 48]
        # 16 of each row at a time: the last element fixes the block's amax, thus its scale.
        parts = [torch.cat([p, x[:, -1:]], dim=1) for p in x[:, :45].split(15, dim=1)]
        for part in parts:
            result = launch.quantize_nvfp4(part, g.to(device), target=targets()[0])
            assert_same_pair(result, numerics.quantize_nvfp4(part, g.to(device)))
            assert torch.equal(result[1].float()[:, 0].cpu(), normal_scales)


def test_nvfp4_signs_of_quotients_that_round_to_zero(device):
    # x / step for subnormal x: at most 2**-150 it rounds to zero, which is not negative.
    x = -torch.arange(64, dtype=torch.int32).view(torch.float32).view(4, 16)
    x[:, 15] = 6 * torch.tensor([1.0, 3.0, 8.0, 40.0])
    g = scalar(1.0, device)
    result = launch.quantize_nvfp4(x.to(device), g, target=targets()[0])
    assert_same_pair(result, numerics.quantize_nvfp4(x.to(device), g))
    assert len(result[0].unique()) > 2


def test_mxfp8_exponent_of_every_power_and_its_neighbours(device):
    # amax / 448 crosses a power of two at 1.75 * 2 ** n: there and one fp32 step to both sides.
    exponents = torch.arange(1, 255, dtype=torch.int32) << 23
    edges = torch.stack([exponents, exponents | 0x600000])
    amax = torch.stack([edges - 1, edges, edges + 1]).view(torch.float32).reshape(-1, 1)
    x = torch.cat([amax, -amax / 3, torch.zeros(amax.numel(), 30)], dim=1).to(device)
    result = launch.quantize_mxfp8(x, target=targets()[0])
    assert_same_pair(result, numerics.quantize_mxfp8(x))


def expected_fake_nvfp4(x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    codes, scale = numerics.quantize_nvfp4(x, g)
    values = numerics.decode_e2m1(numerics.unpack_nibbles(codes))
    factors = numerics.decode_e4m3(scale).repeat_interleave(NVFP4_BLOCK, dim=-1)
    return values * factors


@every_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fake_quantize_nvfp4_is_exact(device, target, dtype):
    g = scalar(0.013, device)
    for x in inputs(torch.bfloat16):
        x = x.to(device)
        expected = expected_fake_nvfp4(x, g)
        finite = expected[expected.isfinite()]
        assert torch.equal(finite.to(dtype).float(), finite)
        result, (planned,) = launch.plan_fake_quantize_nvfp4(x, g, dtype, target=target)
        planned.run()
        assert_same_bits(result, expected.to(dtype))
    assert_same_bits(launch.quantize_nvfp4_to_bf16(x, g, target=target), expected.bfloat16())


@every_target
def test_fake_quantize_mxfp8(device, target):
    for x in inputs(torch.bfloat16):
        x = x.to(device)
        expected = numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x), torch.bfloat16)
        assert_same_bits(launch.quantize_mxfp8_to_bf16(x, target=target), expected)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (2, 0, 64), (0,), (64,), (1, 1, 64)])
def test_empty_and_one_dimensional_inputs(device, shape):
    x = normal(*shape).to(device)
    g, target = scalar(0.01, device), targets()[0]
    pairs = [
        (launch.quantize_fp8_per_token(x, target=target), numerics.quantize_fp8_per_token(x)),
        (launch.quantize_fp8_per_block(x, target=target), numerics.quantize_fp8_per_block(x)),
    ]
    if shape[-1]:
        pairs += [
            (launch.quantize_nvfp4(x, g, target=target), numerics.quantize_nvfp4(x, g)),
            (launch.quantize_mxfp8(x, target=target), numerics.quantize_mxfp8(x)),
        ]
    for result, expected in pairs:
        assert_same_pair(result, expected)
        assert launch.dequantize_fp8(result[0].view(torch.float8_e4m3fn), g, target=target).shape
    codes = launch.quantize_fp8(x, g, target=target)
    assert_same_bits(codes, numerics.quantize_fp8(x, numerics.static_fp8_scales(g)[0]))


def test_rows_longer_than_registers_are_read_twice(device):
    x = normal(2, LONGEST_ROW + 1000)
    x[1, -1] = math.nan
    x = x.to(device)
    result = launch.quantize_fp8_per_token(x, target=targets()[0])
    assert_same_pair(result, numerics.quantize_fp8_per_token(x))


def test_more_rows_than_a_second_grid_axis_allows(device):
    x = normal(65536 + 8, 16).to(device)
    result = launch.quantize_nvfp4(x, scalar(1e-3, device), target=targets()[0])
    assert_same_pair(result, numerics.quantize_nvfp4(x, scalar(1e-3, device)))
    assert launch.plan_quantize_fp8_per_token(x, target=SM_90)[1][0].grid[1:] == (1, 1)


def test_a_small_tensor_on_a_large_device_is_cut_into_small_tiles(device):
    x = normal(9, 1040).to(device)
    g = scalar(0.01, device)
    one, many = (replace(targets()[0], processors=count) for count in (1, 132))
    _, (large,) = launch.plan_quantize_nvfp4(x, g, target=one)
    outputs, (small,) = launch.plan_quantize_nvfp4(x, g, target=many)
    assert small.grid[0] > large.grid[0]
    small.run()
    assert_same_pair(outputs, numerics.quantize_nvfp4(x, g))


def test_launchers_leave_the_input_alone(device):
    x = normal(7, 96).to(device)
    before = x.clone()
    for quantize in (launch.quantize_fp8_per_token, launch.quantize_mxfp8):
        quantize(x, target=targets()[0])
    assert torch.equal(x, before)


@draws(multiple=1)
def test_fp8_of_any_shape_and_strides(device, data, g):
    x, target = data.to(device), targets()[-1]
    result = launch.quantize_fp8_per_token(x, target=target)
    assert_same_pair(result, numerics.quantize_fp8_per_token(x))
    result = launch.quantize_fp8_per_block(x, target=target)
    assert_same_pair(result, numerics.quantize_fp8_per_block(x))
    multiplier, _ = numerics.static_fp8_scales(scalar(g, device))
    codes = launch.quantize_fp8(x, scalar(g, device), target=target)
    assert_same_bits(codes, numerics.quantize_fp8(x, multiplier).contiguous())


@draws(multiple=16)
def test_nvfp4_of_any_shape_and_strides(device, data, g):
    x, g, target = data.to(device), scalar(g, device), targets()[-1]
    codes, scale = launch.quantize_nvfp4(x, g, target=target)
    assert_same_pair((codes, scale), numerics.quantize_nvfp4(x, g))
    values = launch.dequantize_nvfp4(codes, scale, g, "float32", target=target)
    assert_same_bits(values, numerics.dequantize_nvfp4(codes, scale, g))


@draws(multiple=32)
def test_mxfp8_of_any_shape_and_strides(device, data, g):
    x, target = data.to(device), targets()[-1]
    codes, exponents = launch.quantize_mxfp8(x, target=target)
    assert_same_pair((codes, exponents), numerics.quantize_mxfp8(x))
    values = launch.dequantize_mxfp8(codes, exponents, "float32", target=target)
    assert_same_bits(values, numerics.dequantize_mxfp8(codes, exponents))


def test_rows_are_found_without_a_copy(device):
    x = torch.zeros(4, 6, 64, device=device)
    nested = launch.rows_of(x[:, :3])
    assert nested.tensor.data_ptr() == x.data_ptr()
    assert nested.arguments == (12, 64, 3, 6 * 64, 64)
    assert nested.nested
    assert launch.rows_of(x).arguments == (24, 64, 24, 0, 64)
    assert launch.rows_of(x[:, -1:]).arguments == (4, 64, 4, 0, 6 * 64)
    turned = launch.rows_of(x.mT)
    assert turned.tensor.data_ptr() != x.data_ptr()
    assert turned.arguments == (256, 6, 256, 0, 6)


def test_targets_without_an_fp8_type_get_bytes():
    x = torch.empty(4, 64, dtype=torch.bfloat16, device="meta")
    (codes, _), (planned,) = launch.plan_quantize_fp8_per_token(x, target=SM_80)
    assert codes.dtype == torch.float8_e4m3fn
    tensors = [a for a in planned.args if isinstance(a, torch.Tensor)]
    assert torch.float8_e4m3fn not in {t.dtype for t in tensors}
