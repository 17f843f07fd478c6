"""One row by an NVFP4 weight without a matrix instruction: exact products in a fixed order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mokernels import numerics
from mokernels.ops import launch
from mokernels.ops.configs import Kind, choose
from mokernels.ops.launch import gemv as gemv_launch
from mokernels.ops.launch.decode import plan_nvfp4_decode
from mokernels.ops.launch.linear import plan_nvfp4_linear
from mokernels.ops.launch.plan import run
from mokernels.ops.launch.product import Planned
from mokernels.ops.launch.quantize import plan_fake_quantize_nvfp4
from mokernels.ops.quantizing import WEIGHTS_WORTH_A_LAUNCH
from mokernels.ops.target import HIP_TARGETS, Target
from tests.kernels.products import (
    BF16,
    FP8,
    FP16,
    FP32,
    TARGETS,
    Draw,
    assert_product,
    biases,
    few_processors,
    floats,
    layouts,
    restride,
    seeds,
)
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting

NAMES = {BF16: "bfloat16", FP16: "float16", FP32: "float32"}
GEMV = ["gemv_nvfp4"]
SPLIT_GEMV = {"cuda": GEMV, "hip": ["gemv_nvfp4", "reduce_splits"]}
BLOCK_K = 2048
one_row = st.sampled_from([(), (1,), (1, 1, 1)])
columns = st.sampled_from([1, 3, 4, 9, 16])
inner = st.sampled_from([0, 32, 96, 288, BLOCK_K, BLOCK_K + 32, 2 * BLOCK_K])
# AMD's devices decode without PTX.
ALL_TARGETS = (*TARGETS, *HIP_TARGETS) if interpreting() else TARGETS
DECODING = [target for target in ALL_TARGETS if not target.has_nvfp4_dot]
targets = st.sampled_from(ALL_TARGETS)
FAMILIES = {(target.backend, target.has_fp8_type): target for target in reversed(ALL_TARGETS)}
every_target = pytest.mark.parametrize("target", FAMILIES.values(), ids=lambda target: target.name)
every_float = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=lambda d: NAMES[d])

Weight = tuple[Tensor, Tensor, Tensor]
"""Codes, block scales and the global scale."""


def drawn_weight(draw: Draw, n: int, k: int, layout: str = "dense", rows: bool = False) -> Weight:
    """With one global scale, or one for each of its rows."""
    codes, scale = draw.packed(n, k // 2), draw.block_scale(n, k // 16)
    return restride(codes, layout), restride(scale, layout), draw.scale(*([n] if rows else []))


def names(planned: Planned) -> list[str]:
    return [one.kernel.__name__ for one in planned[1]]


def plan(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    target: Target,
    dtype: torch.dtype | None = None,
    plan_n: int = 0,
) -> Planned:
    codes, scale, global_scale = weight
    tail = (None, global_scale, bias, dtype or x.dtype, plan_n)
    return plan_nvfp4_decode(x, codes, scale, *tail, target=target)


def gemv(x: Tensor, weight: Weight, bias: Tensor | None, target: Target, **options) -> Tensor:
    """The product by the GEMV, which is checked."""
    planned = plan(x, weight, bias, target, **options)
    assert names(planned) in (GEMV, SPLIT_GEMV[target.backend])
    return run(planned)


@settings(max_examples=40)
@given(
    seeds, targets, one_row, columns, inner, floats, floats, biases, layouts, layouts, st.booleans()
)
def test_against_exact_products(
    device, seed, target, lead, n, k, dtype, out_dtype, bias_dtype, x_layout, layout, rows
):
    draw = Draw(device, seed)
    x = restride(draw.normal(*lead, k, dtype=dtype), x_layout)
    weight, bias = drawn_weight(draw, n, k, layout, rows), draw.bias(n, bias_dtype)
    planned = plan(x, weight, bias, target, dtype=out_dtype)
    assert names(planned) == GEMV or k == 0
    codes, scale, global_scale = weight
    w = numerics.dequantize_nvfp4(
        codes, scale, global_scale.reshape(-1, 1) if rows else global_scale
    )
    assert_product(run(planned), x.float(), w, bias, out_dtype)


def inner_of_two_splits(target: Target) -> int:
    """A K, a multiple of 32 but not of a K step, that is just long enough to be split."""
    k = 7 * BLOCK_K + 32
    assert choose(Kind.GEMV_NVFP4, 1, 8, k, target).split_k == 2
    return k


@every_target
@every_float
def test_split_k(device, target, dtype):
    draw, target, n = Draw(device, 1), few_processors(target), 7
    k = inner_of_two_splits(target)
    x, weight, bias = draw.normal(1, k, dtype=dtype), drawn_weight(draw, n, k), draw.bias(n, BF16)
    planned = plan(x, weight, bias, target)
    assert names(planned) == SPLIT_GEMV[target.backend]
    assert planned[1][0].constants["SPLIT"] is not None
    assert_product(run(planned), x.float(), numerics.dequantize_nvfp4(*weight), bias, dtype)


@settings(max_examples=12)
@given(
    seeds, targets, floats, st.sampled_from([(0, 1), (0, 5), (3, 7), (4, 12)]),
    st.sampled_from([96, BLOCK_K + 32]),
)  # fmt: skip
def test_a_row_has_the_same_bits_alone_and_among_others(device, seed, target, dtype, rows, k):
    draw, (start, stop), n = Draw(device, seed), rows, 13
    x, (codes, scale, global_scale) = draw.normal(1, k, dtype=dtype), drawn_weight(draw, n, k)
    whole = gemv(x, (codes, scale, global_scale), None, target)
    member = (codes[start:stop], scale[start:stop], global_scale)
    found = gemv(x, member, None, target, plan_n=n)
    assert_same_bits(found, whole[:, start:stop].contiguous())


@every_target
@pytest.mark.parametrize("quantized", [False, True], ids=["weight-only", "quantized"])
def test_a_member_of_a_group_is_split_as_the_group(device, target, quantized):
    draw, target = Draw(device, 2), few_processors(target)
    k, n, size = inner_of_two_splits(target), 36, 5
    group, alone = (choose(Kind.GEMV_NVFP4, 1, it, k, target).split_k for it in (n, size))
    assert group != alone, "a member alone adds in the same order anyway: nothing is tested"
    x, (codes, scale, global_scale) = draw.normal(1, k, dtype=BF16), drawn_weight(draw, n, k)
    # A large group, so that quantized rows take the GEMV too; its first rows stand for all.
    plan_n = n if not quantized else WEIGHTS_WORTH_A_LAUNCH // k + 1

    def product(rows: int) -> Tensor:
        weight = (codes[:rows], scale[:rows], global_scale)
        if quantized and not target.has_nvfp4_dot:
            arguments = (draw_input_scale(device), None, plan_n)
            return launch.nvfp4_linear(x, *weight, *arguments, target=target)
        return gemv(x, weight, None, target, plan_n=plan_n)

    assert_same_bits(product(size), product(n)[:, :size].contiguous())


def draw_input_scale(device: torch.device) -> Tensor:
    return torch.full((), 2.0**-9, device=device)


@pytest.mark.skipif(
    not DECODING, reason="this device's matrix units apply block scales: they take the codes"
)
@settings(max_examples=25)
@given(
    seeds, st.sampled_from(DECODING or [None]), one_row,
    columns, st.sampled_from([32, 288, BLOCK_K + 32]), floats, biases, layouts, st.booleans(),
)  # fmt: skip
def test_the_linear_operator_is_the_quantizer_and_the_product(
    device, seed, target, lead, n, k, dtype, bias_dtype, layout, large
):
    draw = Draw(device, seed)
    x, bias = restride(draw.normal(*lead, k, dtype=dtype), layout), draw.bias(n, bias_dtype)
    weight, input_scale = drawn_weight(draw, n, k), draw.scale() * 2.0**-4
    plan_n = WEIGHTS_WORTH_A_LAUNCH // k + 1 if large else 0
    planned = plan_nvfp4_linear(x, *weight, input_scale, bias, plan_n, target=target)
    wanted = ["quantize_blocks", *GEMV] if large else ["gemm_decode"]
    assert names(planned)[: len(wanted)] == wanted
    found = run(planned)
    values = run(plan_fake_quantize_nvfp4(x, input_scale, BF16, target=target))
    tail = (bias, plan_n, input_scale, NAMES[dtype])
    assert_same_bits(found, launch.nvfp4_weight_only_gemm(values, *weight, *tail, target=target))
    exact = numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(x, input_scale), input_scale)
    assert_product(found, exact, numerics.dequantize_nvfp4(*weight), bias, dtype)


@every_target
def test_every_code_by_every_scale_is_exact(device, target, monkeypatch):
    # Rows have one scale each and all codes at all positions of a group; x picks one column.
    scale = torch.arange(127, dtype=torch.uint8, device=device).view(FP8)[:, None].expand(127, 2)
    turn = torch.arange(127, device=device)[:, None] + torch.arange(32, device=device)
    packed = numerics.pack_nibbles((turn % 16).to(torch.uint8))
    weight = (packed, scale, torch.ones((), device=device))
    exact = numerics.dequantize_nvfp4(*weight)
    if interpreting():
        # All rows in one tile: a program takes the interpreter its time whatever the tile.
        monkeypatch.setattr(gemv_launch, "choose", lambda *a: replace(choose(*a), block_n=128))
    for column, x in enumerate(torch.eye(32, device=device)):
        # + 0: a sum that starts at 0 does not keep the sign of a zero.
        assert_same_bits(gemv(x, weight, None, target), exact[:, column] + 0)


@every_target
def test_a_block_scale_of_nan_reaches_its_row(device, target):
    draw, (n, k) = Draw(device, 3), (9, 160)
    weight = drawn_weight(draw, n, k)
    weight[1].view(torch.uint8)[7, 9] = 0x7F
    y = gemv(draw.normal(1, k, dtype=BF16), weight, None, target)
    assert y.isnan().tolist() == [[row == 7 for row in range(n)]]


@every_target
@every_float
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays(device, target, dtype, special):
    draw, (n, k) = Draw(device, 4), (5, 96)
    weight, x = drawn_weight(draw, n, k), draw.normal(1, k, dtype=dtype)
    x[:, 40] = special
    exact = x.float() @ numerics.dequantize_nvfp4(*weight).T
    y = gemv(x, weight, None, target).float()
    assert_same_bits(y.nan_to_num(7.0, 8.0, 9.0), exact.nan_to_num(7.0, 8.0, 9.0))


@every_target
def test_large_fp32_activations_do_not_overflow_early(device, target):
    draw, (n, k) = Draw(device, 5), (5, 64)
    x, (codes, scale, global_scale) = draw.normal(1, k) * 2.0**110, drawn_weight(draw, n, k)
    weight = (codes, scale, global_scale)
    y = gemv(x, weight, None, target)
    assert y.isfinite().all()
    assert_product(y, x, numerics.dequantize_nvfp4(*weight), None, FP32)


@every_target
@every_float
def test_a_row_may_start_anywhere(device, target, dtype):
    draw, (n, k) = Draw(device, 6), (5, 96)
    x, weight = draw.normal(1, k + 1, dtype=dtype)[:, 1:], drawn_weight(draw, n, k)
    assert_same_bits(gemv(x, weight, None, target), gemv(x.clone(), weight, None, target))
    # What surrounds the row is not read as part of it.
    assert_product(
        gemv(x, weight, None, target), x.float(), numerics.dequantize_nvfp4(*weight), None, dtype
    )


@every_target
@pytest.mark.parametrize("n", [1, 5])
def test_rows_of_scales_may_start_at_odd_bytes(device, target, n):
    draw, k = Draw(device, 8), 96
    x, (codes, scale, global_scale) = draw.normal(1, k), drawn_weight(draw, n, k)
    wide = torch.zeros(n, k // 16 + 1, dtype=torch.uint8, device=device)
    wide[:, 1:] = scale.view(torch.uint8)
    found = gemv(x, (codes, wide[:, 1:].view(FP8), global_scale), None, target)
    assert_same_bits(found, gemv(x, (codes, scale, global_scale), None, target))


@every_target
@pytest.mark.parametrize("what", ["offset", "stride", "k", "rows"])
def test_what_it_cannot_load_goes_to_the_matrix_units(device, target, what):
    draw, n, k = Draw(device, 7), 5, 48 if what == "k" else 96
    codes, scale, global_scale = drawn_weight(draw, n, k)
    if what == "offset":
        codes = torch.cat([codes.new_zeros(8), codes.reshape(-1)])[8:].view(n, k // 2)
    if what == "stride":
        codes = torch.cat([codes, codes.new_zeros(n, 8)], dim=1)[:, : k // 2]
    x = draw.normal(2 if what == "rows" else 1, k, dtype=BF16)
    planned = plan(x, (codes, scale, global_scale), None, target)
    assert names(planned) == ["gemm_decode"]
    w = numerics.dequantize_nvfp4(codes, scale, global_scale)
    assert_product(run(planned), x.float(), w, None, BF16)


def test_the_number_of_processors_is_no_part_of_the_tile():
    for target in ALL_TARGETS:
        config = choose(Kind.GEMV_NVFP4, 1, 4096, 4096, target)
        few = choose(Kind.GEMV_NVFP4, 1, 64, 4096, few_processors(target))
        assert replace(config, split_k=1) == replace(few, split_k=1)
