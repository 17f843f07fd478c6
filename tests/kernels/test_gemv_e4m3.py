"""One row by an E4M3 weight without a matrix instruction: exact products in a fixed order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mokernels import numerics
from mokernels.invariance import batch_invariant
from mokernels.ops import launch, quantizing
from mokernels.ops.configs import Kind, choose
from mokernels.ops.launch import gemv as gemv_launch
from mokernels.ops.launch.decode import plan_mxfp8_decode
from mokernels.ops.launch.gemm import plan_fp8_weight_only
from mokernels.ops.launch.linear import plan_mxfp8_linear
from mokernels.ops.launch.plan import run
from mokernels.ops.launch.product import Planned
from mokernels.ops.launch.quantize import plan_fake_quantize_mxfp8
from mokernels.ops.quantizing import E4M3_WEIGHTS_WORTH_A_GEMV
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
KINDS = {
    "tensor": Kind.GEMV_FP8,
    "channel": Kind.GEMV_FP8,
    "128x128": Kind.GEMV_BLOCK,
    "mxfp8": Kind.GEMV_MXFP8,
}
GEMV = ["gemv_e4m3"]
SPLIT_GEMV = {"cuda": GEMV, "hip": ["gemv_e4m3", "reduce_splits"]}
BLOCK_K = 1024
one_row = st.sampled_from([(), (1,), (1, 1, 1)])
columns = st.sampled_from([1, 3, 4, 9, 16])
inner = st.sampled_from([32, 96, 160, BLOCK_K, BLOCK_K + 32, 2 * BLOCK_K + 160])
halves = st.sampled_from([BF16, FP16])
# AMD's devices decode without PTX.
ALL_TARGETS = (*TARGETS, *HIP_TARGETS) if interpreting() else TARGETS
DECODING = [target for target in ALL_TARGETS if not target.has_mxfp8_dot]
targets = st.sampled_from(ALL_TARGETS)
FAMILIES = {(target.backend, target.has_fp8_type): target for target in reversed(ALL_TARGETS)}
every_target = pytest.mark.parametrize("target", FAMILIES.values(), ids=lambda target: target.name)
every_half = pytest.mark.parametrize("dtype", [BF16, FP16], ids=lambda d: NAMES[d])
every_kind = pytest.mark.parametrize("kind", KINDS)

Weight = tuple[Tensor, Tensor]
"""Codes and scales."""


def drawn_weight(draw: Draw, kind: str, n: int, k: int, layout: str = "dense") -> Weight:
    shapes = {"tensor": (), "channel": (n,), "128x128": (-(-n // 128), -(-k // 128))}
    scale = draw.exponents(n, k // 32) if kind == "mxfp8" else draw.scale(*shapes[kind])
    # Scales of channels have one dimension, of every second item of a longer tensor.
    if kind == "channel":
        scale = torch.stack([scale, scale + 1], dim=1)[:, 0]
    return restride(draw.e4m3(n, k), layout), restride(scale, layout) if scale.dim() == 2 else scale


def values_of(kind: str, weight: Weight) -> Tensor:
    """The weight in fp32."""
    return (numerics.dequantize_mxfp8 if kind == "mxfp8" else numerics.dequantize_fp8)(*weight)


def large(k: int) -> int:
    """Rows of a group that is large enough; its first ones stand for all."""
    return E4M3_WEIGHTS_WORTH_A_GEMV // k + 1


def names(planned: Planned) -> list[str]:
    return [one.kernel.__name__ for one in planned[1]]


def plan(
    kind: str,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    target: Target,
    plan_n: int | None = None,
    invariant: bool = False,
) -> Planned:
    plan_n = large(x.shape[-1]) if plan_n is None else plan_n
    options = {"target": target, "invariant": invariant}
    if kind == "mxfp8":
        return plan_mxfp8_decode(x, *weight, bias, x.dtype, plan_n, **options)
    return plan_fp8_weight_only(x, *weight, bias, plan_n, **options)


def gemv(
    kind: str, x: Tensor, weight: Weight, bias: Tensor | None, target: Target, **options
) -> Tensor:
    """The product by the GEMV, which is checked."""
    planned = plan(kind, x, weight, bias, target, **options)
    assert names(planned) in (GEMV, SPLIT_GEMV[target.backend])
    return run(planned)


# A product is not rounded before it is added, and what is added to it rounds once for each element
# of K, as assert_product allows; multiplying sums by scales is among its 16 more, since it does so
# once on the way of each product.
@settings(max_examples=60)
@given(
    seeds, targets, st.sampled_from([*KINDS]), one_row, columns, inner, halves, biases, layouts,
    layouts,
)  # fmt: skip
def test_against_exact_products(
    device, seed, target, kind, lead, n, k, dtype, bias_dtype, x_layout, layout
):
    draw = Draw(device, seed)
    k += 16 * (kind != "mxfp8")  # nor is there a whole block of scales at the end
    x = restride(draw.normal(*lead, k, dtype=dtype), x_layout)
    weight, bias = drawn_weight(draw, kind, n, k, layout), draw.bias(n, bias_dtype)
    found = gemv(kind, x, weight, bias, target)
    assert_product(found, x.float(), values_of(kind, weight), bias, dtype)


@every_target
def test_rows_of_several_blocks_have_their_scales(device, target):
    draw, n, k = Draw(device, 1), 258, 272
    x, weight = draw.normal(1, k, dtype=BF16), drawn_weight(draw, "128x128", n, k)
    weight[1][:] *= 2.0 ** torch.arange(9, device=device).view(3, 3)
    assert_product(gemv("128x128", x, weight, None, target), x.float(), values_of("", weight))


@pytest.fixture
def any_size(monkeypatch):
    """Small weights are multiplied without matrix units too."""
    monkeypatch.setattr(quantizing, "E4M3_WEIGHTS_WORTH_A_GEMV", 0)


def inner_of_two_splits(target: Target) -> int:
    """A K, a multiple of 32 but not of a K step, that is just long enough to be split."""
    k = 7 * BLOCK_K + 32
    assert {choose(kind, 1, 8, k, target).split_k for kind in KINDS.values()} == {2}
    return k


@pytest.mark.usefixtures("any_size")
@every_target
@every_kind
def test_split_k(device, target, kind):
    draw, target, n = Draw(device, 1), few_processors(target), 7
    k = inner_of_two_splits(target)
    x, weight = draw.normal(1, k, dtype=BF16), drawn_weight(draw, kind, n, k)
    bias = draw.bias(n, BF16)
    planned = plan(kind, x, weight, bias, target, plan_n=0)
    assert names(planned) == SPLIT_GEMV[target.backend]
    assert planned[1][0].constants["SPLIT"] is not None
    assert_product(run(planned), x.float(), values_of(kind, weight), bias, BF16)


@settings(max_examples=15)
@given(
    seeds, targets, st.sampled_from([*KINDS]), halves,
    st.sampled_from([(0, 1), (0, 5), (3, 7), (4, 12)]), st.sampled_from([96, BLOCK_K + 32]),
)  # fmt: skip
def test_a_row_has_the_same_bits_alone_and_among_others(device, seed, target, kind, dtype, rows, k):
    # Blocks of scales have 128 rows, with which a member of a group begins.
    first = 128 if kind == "128x128" else 0
    draw, (start, stop), n = Draw(device, seed), rows, first + 13
    x, (codes, scale) = draw.normal(1, k, dtype=dtype), drawn_weight(draw, kind, n, k)
    whole = gemv(kind, x, (codes, scale), None, target)
    if kind == "128x128":
        start, member_scale = first, scale[1:]
    else:
        member_scale = scale if kind == "tensor" else scale[start:stop]
    stop += first
    found = gemv(kind, x, (codes[start:stop], member_scale), None, target)
    assert_same_bits(found, whole[:, start:stop].contiguous())


@every_target
def test_merged_projections_keep_their_own_scales(device, target):
    draw, k, sizes = Draw(device, 2), BLOCK_K + 48, (5, 2, 4)
    x, codes = draw.normal(1, k, dtype=BF16), draw.e4m3(sum(sizes), k)
    scales = [draw.scale() * 2.0**place for place in range(3)]
    merged = torch.cat([s.expand(n) for s, n in zip(scales, sizes, strict=True)])
    whole = gemv("channel", x, (codes, merged), None, target)
    parts = [
        gemv("tensor", x, weight, None, target)
        for weight in zip(codes.split(sizes), scales, strict=True)
    ]
    assert_same_bits(torch.cat(parts, dim=1), whole)


@pytest.mark.usefixtures("any_size")
@every_target
@pytest.mark.parametrize("kind", ["channel", "mxfp8"])
def test_a_member_of_a_group_is_split_as_the_group(device, target, kind):
    draw, target = Draw(device, 2), few_processors(target)
    k, n, size = inner_of_two_splits(target), 36, 5
    group, alone = (choose(KINDS[kind], 1, it, k, target).split_k for it in (n, size))
    assert group != alone, "a member alone adds in the same order anyway: nothing is tested"
    x, (codes, scale) = draw.normal(1, k, dtype=BF16), drawn_weight(draw, kind, n, k)
    whole = gemv(kind, x, (codes, scale), None, target, plan_n=n)
    member = gemv(kind, x, (codes[:size], scale[:size]), None, target, plan_n=n)
    assert_same_bits(member, whole[:, :size].contiguous())


@pytest.mark.skipif(
    not DECODING, reason="this device's matrix units apply block scales: they take the codes"
)
@settings(max_examples=25)
@given(
    seeds, st.sampled_from(DECODING or [None]), one_row, columns,
    st.sampled_from([32, 288, BLOCK_K + 32]), floats, biases, layouts, st.booleans(),
)  # fmt: skip
def test_the_linear_operator_is_the_quantizer_and_the_product(
    device, seed, target, lead, n, k, dtype, bias_dtype, layout, is_large
):
    draw = Draw(device, seed)
    x, bias = restride(draw.normal(*lead, k, dtype=dtype), layout), draw.bias(n, bias_dtype)
    weight, plan_n = drawn_weight(draw, "mxfp8", n, k), large(k) if is_large else 0
    planned = plan_mxfp8_linear(x, *weight, bias, plan_n, target=target)
    wanted = ["quantize_blocks", *GEMV] if is_large else ["gemm_decode"]
    assert names(planned)[: len(wanted)] == wanted
    found = run(planned)
    values = run(plan_fake_quantize_mxfp8(x, BF16, target=target))
    tail = (bias, plan_n, NAMES[dtype])
    assert_same_bits(found, launch.mxfp8_weight_only_gemm(values, *weight, *tail, target=target))
    pair = launch.quantize_mxfp8(x, target=target)
    codes = (pair[0], weight[0], pair[1], weight[1], bias, NAMES[dtype], plan_n)
    assert_same_bits(found, launch.mxfp8_gemm(*codes, target=target))
    exact = numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x))
    assert_product(found, exact, values_of("mxfp8", weight), bias, dtype)


@every_target
@every_half
def test_every_code_is_exact_at_every_place(device, target, dtype, monkeypatch):
    # Rows have all finite codes at all positions of a group; x picks one column.
    finite = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    turn = torch.arange(len(finite))[:, None] + torch.arange(16)
    codes = finite[turn % len(finite)].view(FP8).to(device)
    weight = (codes, torch.ones((), device=device))
    if interpreting():
        # All rows in one tile: a program takes the interpreter its time whatever the tile.
        monkeypatch.setattr(gemv_launch, "choose", lambda *a: replace(choose(*a), block_n=256))
    for column, x in enumerate(torch.eye(16, device=device, dtype=dtype)):
        # + 0: a sum that starts at 0 does not keep the sign of a zero.
        found = gemv("tensor", x, weight, None, target)
        assert_same_bits(found, codes[:, column].float().to(dtype) + 0)


@every_target
def test_every_exponent_is_exact(device, target):
    codes = torch.full((256, 32), 1.0, device=device).to(FP8)
    scale = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    x = torch.zeros(1, 32, dtype=BF16, device=device)
    x[:, 17] = 1.0
    found = gemv("mxfp8", x, (codes, scale), None, target)
    assert_same_bits(found[0, :255], values_of("mxfp8", (codes, scale))[:255, 17].to(BF16))
    assert found[0, 255].isnan()


@every_target
@every_kind
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_of_nan_reaches_its_row(device, target, kind, code):
    draw, (n, k) = Draw(device, 3), (17, 160)
    weight = drawn_weight(draw, kind, n, k)
    for place in range(16):  # of a group
        weight[0].view(torch.uint8)[place, 16 * (place % 10) + place] = code
    # Also where x is 0.
    x = draw.normal(1, k, dtype=BF16) * (torch.arange(k, device=device) % 2)
    y = gemv(kind, x, weight, None, target)
    assert y.isnan().tolist() == [[row < 16 for row in range(n)]]


@every_target
@every_half
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays(device, target, dtype, special):
    draw, (n, k) = Draw(device, 4), (5, 96)
    for kind in KINDS:
        weight, x = drawn_weight(draw, kind, n, k), draw.normal(1, k, dtype=dtype)
        x[:, 40] = special
        exact = x.float() @ values_of(kind, weight).T
        y = gemv(kind, x, weight, None, target).float()
        assert_same_bits(y.nan_to_num(7.0, 8.0, 9.0), exact.nan_to_num(7.0, 8.0, 9.0))


@every_target
@every_kind
def test_large_activations_do_not_overflow_early(device, target, kind):
    # What 16 products and their sum may have, beside codes of up to 448.
    draw, (n, k) = Draw(device, 5), (5, 64)
    x, weight = draw.normal(1, k, dtype=BF16) * 2.0**110, drawn_weight(draw, kind, n, k)
    y = gemv(kind, x, weight, None, target)
    assert y.isfinite().all()
    assert_product(y, x.float(), values_of(kind, weight), None, BF16)


@every_target
@every_half
def test_a_row_may_start_anywhere(device, target, dtype):
    draw, (n, k) = Draw(device, 6), (5, 96)
    x, weight = draw.normal(1, k + 1, dtype=dtype)[:, 1:], drawn_weight(draw, "mxfp8", n, k)
    found = gemv("mxfp8", x, weight, None, target)
    assert_same_bits(found, gemv("mxfp8", x.clone(), weight, None, target))
    # What surrounds the row is not read as part of it.
    assert_product(found, x.float(), values_of("mxfp8", weight), None, dtype)


ELSEWHERE = ("offset", "stride", "k", "rows", "fp32", "small", "invariant")


@every_target
@pytest.mark.parametrize(
    ("kind", "what"),
    # A K of MXFP8 is a multiple of 32.
    [(kind, what) for kind in KINDS for what in ELSEWHERE if (kind, what) != ("mxfp8", "k")],
)
def test_what_it_does_not_take_goes_to_the_matrix_units(device, target, kind, what):
    draw, n, k = Draw(device, 7), 5, 104 if what == "k" else 96
    codes, scale = drawn_weight(draw, kind, n, k)
    bytes_of = codes.view(torch.uint8)
    if what == "offset":
        bytes_of = torch.cat([bytes_of.new_zeros(8), bytes_of.reshape(-1)])[8:].view(n, k)
    if what == "stride":
        bytes_of = torch.cat([bytes_of, bytes_of[:, :8]], dim=1)[:, :k]
    weight, dtype = (bytes_of.view(FP8), scale), FP32 if what == "fp32" else BF16
    x = draw.normal(2 if what == "rows" else 1, k, dtype=dtype)
    plan_n = 0 if what == "small" else None
    planned = plan(kind, x, weight, None, target, plan_n, invariant=what == "invariant")
    assert names(planned)[0].startswith("gemm")
    assert_product(run(planned), x.float(), values_of(kind, weight), None, dtype)


@every_target
def test_batch_invariant_products_take_the_matrix_units(device, target, monkeypatch):
    draw, k = Draw(device, 8), 96
    x, weight = draw.normal(1, k, dtype=BF16), drawn_weight(draw, "mxfp8", 5, k)
    fp8, plan_n = drawn_weight(draw, "channel", 5, k), large(k)
    seen: list[Kind] = []
    stock = gemv_launch.choose
    monkeypatch.setattr(gemv_launch, "choose", lambda *a: (seen.append(a[0]), stock(*a))[1])

    def run_all() -> None:
        launch.mxfp8_weight_only_gemm(x, *weight, plan_n=plan_n, target=target)
        launch.fp8_weight_only_gemm(x, *fp8, plan_n=plan_n, target=target)
        launch.mxfp8_linear(x, *weight, plan_n=plan_n, target=target)

    with batch_invariant():
        run_all()
    assert seen == []
    run_all()
    linears = [] if target.has_mxfp8_dot else [Kind.GEMV_MXFP8]
    assert seen == [Kind.GEMV_MXFP8, Kind.GEMV_FP8, *linears]


def test_the_number_of_processors_is_no_part_of_the_tile():
    for target in ALL_TARGETS:
        for kind in set(KINDS.values()):
            config = choose(kind, 1, 4096, 4096, target)
            few = choose(kind, 1, 64, 4096, few_processors(target))
            assert replace(config, split_k=1) == replace(few, split_k=1)
