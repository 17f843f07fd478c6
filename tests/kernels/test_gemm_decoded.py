"""Many rows by an NVFP4 or MXFP8 weight that a launch of its own decodes first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mokernels import numerics
from mokernels.invariance import batch_invariant
from mokernels.ops import launch
from mokernels.ops.config_tables import ANY_M
from mokernels.ops.configs import Kind, choose
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.launch import decode, decoded
from mokernels.ops.launch.decoded import ROWS_OF_PART, WORKSPACE_BYTES, parts_of
from mokernels.ops.launch.linear import plan_mxfp8_linear, plan_nvfp4_linear
from mokernels.ops.launch.plan import run
from mokernels.ops.launch.product import Planned
from mokernels.ops.target import SM_90, Target
from tests.kernels.products import BF16, FP8, FP16, FP32, TARGETS, Draw, assert_product
from tests.support import interpreted_dots
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting

MANY = 257
"""Fewest rows that are multiplied so."""
KINDS = {"nvfp4": Kind.HALF_NVFP4, "mxfp8": Kind.HALF_MXFP8}
FEW = [replace(target, processors=4) for target in TARGETS]
HAVE_IT = [t for t in FEW if choose(Kind.HALF_NVFP4, MANY, 64, 64, t).tma]
pytestmark = pytest.mark.skipif(not HAVE_IT, reason="this GPU decodes in the product")
TARGET = HAVE_IT[0] if HAVE_IT else SM_90
every_format = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(autouse=True)
def dots_in_order(monkeypatch):
    """The interpreter's dot adds as BLAS does, which looks at the tile; a GPU's does not."""
    if interpreting():
        monkeypatch.setattr(interpreted_dots, "matrix_product", interpreted_dots.product_in_order)


def drawn(draw: Draw, name: str, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """Codes, scales of blocks, and the global scale of NVFP4."""
    if name == "nvfp4":
        return draw.packed(n, k // 2), draw.block_scale(n, k // 16), draw.scale()
    return draw.e4m3(n, k), draw.exponents(n, k // 32)


def exact(name: str, weight: tuple[torch.Tensor, ...]) -> torch.Tensor:
    if name == "mxfp8":
        return numerics.dequantize_mxfp8(*weight)
    codes, scale, global_scale = weight
    return numerics.dequantize_nvfp4(codes, scale, global_scale.reshape(-1, 1))


def plan(x, name, weight, bias=None, dtype=None, plan_n=0, scale_x=None) -> Planned:
    tail, given = (bias, dtype or x.dtype, plan_n), {"target": TARGET}
    if name == "mxfp8":
        return decode.plan_mxfp8_decode(x, *weight, *tail, **given)
    codes, scale, global_scale = weight
    return decode.plan_nvfp4_decode(x, codes, scale, scale_x, global_scale, *tail, **given)


def kernels_of(planned: Planned) -> list[str]:
    return [one.kernel.__name__ for one in planned[1]]


PART = ["dequantize_blocks", "gemm_persistent"]


def in_parts(monkeypatch, k: int, rows: int) -> None:
    """A workspace of so many rows."""
    monkeypatch.setattr(decoded, "WORKSPACE_BYTES", 2 * rows * k)


@pytest.mark.parametrize("shape", [(MANY, 70, 160), (300, 264, 96), (513, 1, 32), (258, 530, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@every_format
def test_values(device, name, dtype, shape):
    draw, (m, n, k) = Draw(device, 1), shape
    x, weight, bias = draw.normal(m, k, dtype=BF16), drawn(draw, name, n, k), draw.bias(n, BF16)
    planned = plan(x, name, weight, bias, dtype)
    assert kernels_of(planned) == PART
    assert_product(run(planned), x.float(), exact(name, weight), bias, dtype)


@pytest.mark.parametrize("rows", [ROWS_OF_PART, 2 * ROWS_OF_PART])
@every_format
def test_parts_change_no_bit(device, name, rows, monkeypatch):
    draw, (m, n, k) = Draw(device, 2), (MANY, 1100, 64)
    x, weight, bias = draw.normal(m, k, dtype=BF16), drawn(draw, name, n, k), draw.bias(n, FP32)
    scale_x = None
    if name == "nvfp4":  # a global scale for each row, as of a fused group
        weight, scale_x = (*weight[:2], draw.scale(2 * n)[::2]), draw.scale()
    whole = plan(x, name, weight, bias, FP32, scale_x=scale_x)
    assert kernels_of(whole) == PART
    in_parts(monkeypatch, k, rows)
    parts = plan(x, name, weight, bias, FP32, scale_x=scale_x)
    assert kernels_of(parts) == PART * -(-n // rows)
    y = run(parts)
    assert_same_bits(y, run(whole))
    w = exact(name, weight) * (1 if scale_x is None else scale_x)
    assert_product(y, x.float(), w, bias, FP32)


@every_format
def test_activations_that_tma_cannot_read_are_copied(device, name):
    draw, (m, n, k) = Draw(device, 3), (MANY, 40, 96)
    x, weight = draw.normal(m, k, dtype=BF16), drawn(draw, name, n, k)
    y = run(plan(x, name, weight, dtype=FP32))
    odd = torch.empty(m * (k + 3) + 3, dtype=BF16, device=device)
    for strides, first in (((k + 3, 1), 0), ((k, 1), 3), ((1, m), 0)):
        other = odd.as_strided((m, k), strides, first)
        other.copy_(x)
        planned = plan(other, name, weight, dtype=FP32)
        assert kernels_of(planned) == PART
        assert_same_bits(run(planned), y)
    one_row = x[:1].expand(m, k)
    found = run(plan(one_row, name, weight, dtype=FP32))
    assert_same_bits(found, y[:1].expand(m, n).contiguous())


@every_format
def test_any_strides_of_the_weight_and_leading_dimensions(device, name):
    draw, (n, k) = Draw(device, 4), (70, 160)
    x, weight = draw.normal(2, 3, 50, k, dtype=BF16), drawn(draw, name, n, k)
    y = run(plan(x, name, weight, dtype=FP32))
    assert y.shape == (2, 3, 50, n)
    transposed = [t.t().contiguous().t() for t in weight[:2]]
    wide = [torch.cat([t.view(torch.uint8)] * 2, 1).view(t.dtype) for t in weight[:2]]
    sliced = [t[:, : t.shape[1] // 2] for t in wide]
    for codes, scale in (transposed, sliced):
        assert_same_bits(run(plan(x, name, (codes, scale, *weight[2:]), dtype=FP32)), y)


def test_fp16_activations_meet_an_nvfp4_weight_in_fp16(device):
    draw, (m, n, k) = Draw(device, 5), (MANY, 70, 160)
    x, weight = draw.normal(m, k, dtype=FP16), drawn(draw, "nvfp4", n, k)
    planned = plan(x, "nvfp4", weight)
    assert kernels_of(planned) == PART
    assert planned[1][1].args[1].base.dtype == FP16
    assert_product(run(planned), x.float(), exact("nvfp4", weight), None, FP16)


@every_format
def test_every_value_is_that_of_the_product_that_decodes(device, name):
    # x picks columns: the product is the weight, every code times every scale. Both in fp32.
    if name == "nvfp4":
        scale = torch.arange(127, dtype=torch.uint8, device=device).view(FP8)[:, None]
        codes = torch.arange(16, dtype=torch.uint8, device=device).expand(127, 16)
        weights = [(numerics.pack_nibbles(codes), scale, torch.ones((), device=device))]
    else:
        exponents = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
        codes = torch.arange(256, dtype=torch.uint8, device=device).view(8, 32).view(FP8)
        weights = [(row.expand(256, 32).contiguous(), exponents) for row in codes]
    for weight in weights:
        k = 16 if name == "nvfp4" else 32
        # A row by itself, since a sum with NaN is NaN.
        x = torch.eye(k, dtype=BF16, device=device)
        few = run(plan(x, name, weight, dtype=FP32))
        many = run(plan(x.repeat(MANY // k + 1, 1), name, weight, dtype=FP32))
        assert torch.equal(few.nan_to_num(), many[:k].nan_to_num())
        assert torch.equal(few.isnan(), many[:k].isnan())


@every_format
def test_a_fused_group_equals_its_members_to_the_bit(device, name, monkeypatch):
    draw, k, members = Draw(device, 6), 96, (256, 40, 300)
    n = sum(members)
    x, weight = draw.normal(MANY, k, dtype=BF16), drawn(draw, name, n, k)
    in_parts(monkeypatch, k, ROWS_OF_PART)
    fused, start = run(plan(x, name, weight, dtype=FP32)), 0
    for size in members:
        rows = slice(start, start + size)
        member = (weight[0][rows], weight[1][rows], *weight[2:])
        found = run(plan(x, name, member, dtype=FP32, plan_n=n))
        assert_same_bits(found, fused[:, rows].contiguous())
        start += size


@every_format
def test_linear_layers_launch_three_kernels(device, name):
    draw, (m, n, k) = Draw(device, 7), (MANY, 70, 160)
    x, weight = draw.normal(m, k, dtype=FP16), drawn(draw, name, n, k)
    if name == "nvfp4":
        one = draw.scale() * 2.0**-4
        planned = plan_nvfp4_linear(x, *weight, one, None, target=TARGET)
        values = numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(x, one), one)
    else:
        planned = plan_mxfp8_linear(x, *weight, None, target=TARGET)
        values = numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x))
    assert kernels_of(planned) == ["quantize_blocks", *PART]
    assert_product(run(planned), values, exact(name, weight), None, FP16)


@every_format
def test_batch_invariance_decodes_in_the_product(device, name):
    draw, (m, n, k) = Draw(device, 8), (MANY, 40, 96)
    x, weight = draw.normal(m, k, dtype=BF16), drawn(draw, name, n, k)
    operator = getattr(launch, f"{name}_weight_only_gemm")
    with batch_invariant():
        batch = operator(x, *weight, out_dtype="float32", target=TARGET)
        for row in (0, m - 1):
            alone = operator(x[row : row + 1], *weight, out_dtype="float32", target=TARGET)
            assert_same_bits(alone, batch[row : row + 1])


def test_other_products_stay_as_they_are(device):
    draw = Draw(device, 9)
    nvfp4, mxfp8 = drawn(draw, "nvfp4", 40, 96), drawn(draw, "mxfp8", 40, 96)
    for dtype in (FP32, FP16):
        x = draw.normal(MANY, 96, dtype=dtype)
        assert kernels_of(plan(x, "mxfp8", mxfp8)) == ["gemm_decode"]
    assert kernels_of(plan(x.float(), "nvfp4", nvfp4)) == ["gemm_decode"]
    x = draw.normal(MANY - 1, 96, dtype=BF16)
    assert "gemm_persistent" not in kernels_of(plan(x, "nvfp4", nvfp4))
    # No K: nothing that TMA could read.
    x, empty = x.new_empty(MANY, 0), drawn(draw, "mxfp8", 40, 0)
    planned = plan(x, "mxfp8", empty, draw.bias(40, BF16))
    assert kernels_of(planned) == ["gemm_decode"]
    assert run(planned).shape == (MANY, 40)
    none = (t[:0] for t in nvfp4[:2])
    assert run(plan(x.new_ones(MANY, 96), "nvfp4", (*none, nvfp4[2]))).shape == (MANY, 0)


def test_few_tiles_share_k_between_programs(device):
    # 4 x 2 tiles of 128 x 128 for 132 programs, or for 4.
    assert not choose(Kind.HALF_NVFP4, 512, 256, 4096, SM_90).tma
    assert choose(Kind.HALF_NVFP4, 512, 256, 4096, TARGET).tma
    assert choose(Kind.HALF_NVFP4, 513, 256, 4096, SM_90).tma


@given(st.integers(0, 200_000), st.integers(1, 1 << 21), st.sampled_from([2, 4]))
def test_parts_cover_a_weight_and_are_bounded(n, k, item):
    parts = list(parts_of(n, k, item))
    assert [place for part in parts for place in part][1:-1:2] == [p[0] for p in parts][1:]
    assert (parts[0][0], parts[-1][1]) == (0, n) if n else not parts
    sizes = [stop - start for start, stop in parts]
    assert all(size * k * item <= max(WORKSPACE_BYTES, ROWS_OF_PART * k * item) for size in sizes)
    assert all(size % ROWS_OF_PART == 0 for size in sizes[:-1])
    assert len(set(sizes[:-1])) <= 1
    assert not sizes or 0 < sizes[-1] <= sizes[0]


def test_a_large_weight_is_decoded_at_once():
    assert list(parts_of(28672, 4096, 2)) == [(0, 28672)]
    assert list(parts_of(53248, 16384, 2))[:2] == [(0, 7680), (7680, 15360)]


def test_what_is_launched_is_what_is_chosen(device):
    target: Target = replace(SM_90, processors=132)
    x = torch.empty(2048, 4096, dtype=BF16, device="meta")
    codes = torch.empty(28672, 2048, dtype=torch.uint8, device="meta")
    scale = torch.empty(28672, 256, dtype=FP8, device="meta")
    one = torch.empty((), device="meta")
    planned = decode.plan_nvfp4_decode(x, codes, scale, None, one, None, BF16, target=target)
    config: GemmConfig = choose(Kind.HALF_NVFP4, ANY_M, 28672, 4096, target)
    product = planned[1][1]
    assert product.constants["BLOCK_N"] == config.block_n == 256
    assert product.num_stages == config.num_stages
