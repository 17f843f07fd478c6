"""Products of codes by TMA: right, and the bits of the kernels that load from pointers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mokernels import numerics
from mokernels.invariance import batch_invariant
from mokernels.ops import launch
from mokernels.ops.config_limits import config_ok
from mokernels.ops.configs import GemmConfig, Kind, choose
from mokernels.ops.launch import gemm
from mokernels.ops.launch.persistent import tile_by_tma, tma_reads
from mokernels.ops.target import SM_89, SM_90, SM_100, SM_120, Target
from tests.kernels.products import BF16, FP8, FP16, FP32, TARGETS, Draw, assert_product
from tests.support import interpreted_dots
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting

NAMES = {BF16: "bfloat16", FP16: "float16", FP32: "float32"}
MANY = 257
"""Fewest rows that are multiplied by TMA."""
WITH_TMA = [target for target in TARGETS if target.has_tma]
pytestmark = pytest.mark.skipif(not WITH_TMA, reason="this GPU has no TMA")
every_target = pytest.mark.parametrize("target", WITH_TMA, ids=lambda target: target.name)
chosen_for = pytest.mark.parametrize(
    "target",
    [target for target in WITH_TMA if choose(Kind.FP8, MANY, 64, 64, target).tma],
    ids=lambda target: target.name,
)

# The smallest tile that the instructions of every target take.
TILE = GemmConfig(64, 64, 128, 4, 3, tma=True)
SCALES = {
    "tensor": ("scalar", "scalar"),
    "token, channel": ("vector", "vector"),
    "blocks": ("blocks", "blocks"),
    "blocks, channel": ("blocks", "vector"),
    "token, blocks": ("vector", "blocks"),
}


def scale_of(draw: Draw, kind: str, rows: int, k: int, per: int) -> torch.Tensor:
    """Of a matrix [rows, k]: one, one for each row, or one for each block [per, 128]."""
    shapes = {"scalar": (), "vector": (rows,), "blocks": (-(-rows // per), -(-k // 128))}
    return draw.scale(*shapes[kind])


def by(monkeypatch, config: GemmConfig) -> None:
    """Let launchers choose this configuration, whatever the product."""
    monkeypatch.setattr(gemm, "choose", lambda *_: config)


def kernels_of(planned: gemm.Planned) -> list[str]:
    return [one.kernel.__name__ for one in planned[1]]


# M, N, K: one tile; tails in all three; one row; more tiles than programs, and a last turn of
# which some programs have none.
SHAPES = [(64, 64, 128), (70, 65, 144), (1, 1, 16), (200, 190, 272)]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", WITH_TMA[:1], ids=lambda target: target.name)
def test_the_same_bits_as_from_pointers(device, target, shape, scales, monkeypatch):
    draw, (m, n, k) = Draw(device, 1), shape
    a, b = draw.e4m3(m, k), draw.e4m3(n, k)
    kinds = SCALES[scales]
    scale_a, scale_b = scale_of(draw, kinds[0], m, k, 1), scale_of(draw, kinds[1], n, k, 128)
    bias = draw.bias(n, BF16)
    promote = 128 if target.promotes_accumulator and "blocks" not in kinds else None
    results = []
    for tma in (True, False):
        by(monkeypatch, replace(TILE, tma=tma, promote=promote))
        arguments = (a, b, scale_a, scale_b, bias)
        few = replace(target, processors=5)
        planned = gemm.plan_fp8_gemm(*arguments, FP32, target=few)
        tiles = -(-m // 64) * -(-n // 64)
        assert (kernels_of(planned) == ["gemm_persistent"]) == tma
        assert planned[1][0].grid == (min(tiles, 5) if tma else tiles, 1, 1)
        results.append(gemm.run(planned))
    assert_same_bits(*results)
    operands = (numerics.dequantize_fp8(a, scale_a), numerics.dequantize_fp8(b, scale_b))
    assert_product(results[0], *operands, bias, FP32, native_fp8=True)


@pytest.mark.parametrize(
    ("dtype", "fast"), [(BF16, False), (BF16, True), (FP16, False), (FP32, True)], ids=str
)
@chosen_for
def test_many_rows(device, target, dtype, fast):
    # As it is chosen, with tails everywhere, and rows and leading dimensions of wider tensors.
    draw, (m, n, k) = Draw(device, 2), (260, 264, 144)
    a, b = draw.e4m3(4, m // 4, k + 16)[..., :k], draw.e4m3(n, k + 32)[:, :k]
    scale_a, scale_b, bias = draw.scale(4, m // 4), draw.scale(n), draw.bias(n, dtype)
    few = replace(target, processors=4)
    planned = gemm.plan_fp8_gemm(a, b, scale_a, scale_b, bias, dtype, fast, target=few)
    assert kernels_of(planned) == ["gemm_persistent"]
    y = gemm.run(planned)
    operands = (numerics.dequantize_fp8(a, scale_a), numerics.dequantize_fp8(b, scale_b))
    assert_product(y, *operands, bias, dtype, native_fp8=True)
    # One item less of K in a row of the weight: not for TMA, and no bit changes.
    c = torch.empty(n * (k + 33), dtype=torch.uint8, device=device).view(FP8)
    c = c.as_strided((n, k), (k + 33, 1)).copy_(b)
    planned = gemm.plan_fp8_gemm(a, c, scale_a, scale_b, bias, dtype, fast, target=few)
    assert kernels_of(planned) == ["gemm_epilogue"]
    assert_same_bits(gemm.run(planned), y)


@pytest.mark.parametrize(("m", "processors"), [(70, 8), (200, 3)])
@pytest.mark.parametrize("scales", ["token, channel", "blocks"])
@pytest.mark.parametrize("one_launch", [True, False])
@pytest.mark.parametrize("target", WITH_TMA[:1], ids=lambda target: target.name)
def test_parts_of_k(device, target, one_launch, scales, m, processors, monkeypatch):
    # Tiles for as many programs, and more, of which each takes its part of several.
    draw, n, k = Draw(device, 8), 130, 656
    a, b, bias = draw.e4m3(m, k), draw.e4m3(n, k), draw.bias(n, BF16)
    kinds = SCALES[scales]
    scale_a, scale_b = scale_of(draw, kinds[0], m, k, 1), scale_of(draw, kinds[1], n, k, 128)
    results, few = [], replace(target, processors=processors)
    promote = 128 if target.promotes_accumulator and "blocks" not in kinds else None
    config = replace(TILE, promote=promote, split_k=3, one_launch=one_launch)
    assert config.split == ("last" if one_launch else "parts")
    for tma in (True, False):
        by(monkeypatch, replace(config, tma=tma))
        planned = gemm.plan_fp8_gemm(a, b, scale_a, scale_b, bias, FP32, target=few)
        product, *reduction = kernels_of(planned)
        assert (product == "gemm_persistent") == tma
        assert reduction == (
            [] if planned[1][0].constants["SPLIT"] == "last" else ["reduce_splits"]
        )
        results.append(gemm.run(planned))
    assert_same_bits(*results)
    operands = (numerics.dequantize_fp8(a, scale_a), numerics.dequantize_fp8(b, scale_b))
    assert_product(results[0], *operands, bias, FP32, native_fp8=True)


@pytest.mark.parametrize("shape", [(130, 129, 256), (1, 300, 160), (257, 128, 608)], ids=str)
@pytest.mark.parametrize("kind", [Kind.NVFP4, Kind.MXFP8], ids=lambda kind: kind.value)
@pytest.mark.parametrize(
    "target", [t for t in WITH_TMA if t.copies_scales], ids=lambda target: target.name
)
def test_block_scales_that_the_matrix_unit_applies(device, target, kind, shape, monkeypatch):
    few, results = replace(target, processors=2), []
    for tma in (True, False):
        by(monkeypatch, replace(choose(kind, MANY, *shape[1:], few), tma=tma))
        planned, operands, bias = scaled_product(Draw(device, 7), kind, *shape, few)
        assert kernels_of(planned) == ["gemm_persistent" if tma else "gemm_native"]
        results.append(gemm.run(planned))
    assert_same_bits(*results)
    assert_product(results[0], *operands, bias, FP32)


def scaled_product(
    draw: Draw, kind: Kind, m: int, n: int, k: int, target: Target
) -> tuple[gemm.Planned, list[torch.Tensor], torch.Tensor | None]:
    """What is planned, its decoded operands, and its bias."""
    bias = draw.bias(n, FP32)
    if kind is Kind.MXFP8:
        codes = (draw.e4m3(m, k), draw.e4m3(n, k))
        scales = (draw.exponents(m, k // 32), draw.exponents(n, k // 32))
        decoded = map(numerics.dequantize_mxfp8, codes, scales)
        planned = gemm.plan_mxfp8_gemm(*codes, *scales, bias, FP32, target=target)
    else:
        codes = (draw.packed(m, k // 2), draw.packed(n, k // 2))
        scales = (draw.block_scale(m, k // 16), draw.block_scale(n, k // 16))
        globals_ = (draw.scale(), draw.scale())
        decoded = map(numerics.dequantize_nvfp4, codes, scales, globals_)
        planned = gemm.plan_nvfp4_gemm(*codes, *scales, *globals_, bias, FP32, target=target)
    return planned, list(decoded), bias


@every_target
def test_a_wide_tile(device, target, monkeypatch):
    draw, (m, n, k) = Draw(device, 6), (70, 500, 144)
    a, b, scale_a, scale_b = draw.e4m3(m, k), draw.e4m3(n, k), draw.scale(m), draw.scale(n)
    by(monkeypatch, replace(TILE, block_n=256, num_stages=2))
    few = replace(target, processors=4)
    planned = gemm.plan_fp8_gemm(a, b, scale_a, scale_b, None, BF16, target=few)
    assert planned[1][0].constants["BLOCK_N"] == 256
    operands = (numerics.dequantize_fp8(a, scale_a), numerics.dequantize_fp8(b, scale_b))
    assert_product(gemm.run(planned), *operands, None, BF16, native_fp8=True)


@chosen_for
def test_a_fused_group_equals_its_members_to_the_bit(device, target):
    draw, k, members = Draw(device, 3), 272, (128, 40, 128)
    m, n = MANY, sum(members)
    a, b = draw.e4m3(m, k), draw.e4m3(n, k)
    scale_a, scale_b = draw.scale(m), draw.scale(n)
    fused = launch.fp8_gemm(a, b, scale_a, scale_b, None, "float32", target=target)
    start = 0
    for size in members:
        rows = slice(start, start + size)
        given = (a, b[rows], scale_a, scale_b[rows], None, "float32")
        member = launch.fp8_gemm(*given, plan_n=n, target=target)
        assert_same_bits(member, fused[:, rows].contiguous())
        start += size


@chosen_for
def test_a_row_of_a_batch_is_the_row_alone(device, target, monkeypatch):
    if interpreting():
        monkeypatch.setattr(interpreted_dots, "matrix_product", interpreted_dots.product_in_order)
    # Two parts of K, which one program adds for many rows, and K at once, by TMA.
    target = replace(target, processors=2)
    draw, m, n = Draw(device, 4), MANY, 40
    for k in (1040, 272):
        a, b, scale_a, scale_b = draw.e4m3(m, k), draw.e4m3(n, k), draw.scale(m), draw.scale(n)
        with batch_invariant():
            batch = launch.fp8_gemm(a, b, scale_a, scale_b, None, "float32", target=target)
            for row in (0, m - 1):
                one = slice(row, row + 1)
                given = (a[one], b, scale_a[one], scale_b, None, "float32")
                assert_same_bits(launch.fp8_gemm(*given, target=target), batch[one])


def test_no_rows(device):
    b, one = Draw(device, 5).e4m3(64, 128), torch.ones((), device=device)
    y = launch.fp8_gemm(b[:0], b, one, one, target=WITH_TMA[0])
    assert y.shape == (0, 64)


def fp8(*shape: int, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    strides = strides or (shape[1], 1)
    return torch.empty_strided(shape, strides, dtype=FP8, device="meta")


READABLE = [
    (fp8(512, 4096), True),
    (fp8(512, 144), True),
    (fp8(512, 130, strides=(144, 1)), True),  # only whole rows have to be aligned
    (fp8(512, 4100), False),  # rows start at multiples of 4 bytes
    (fp8(512, 130), False),
    (fp8(512, 4096, strides=(0, 1)), False),  # one row, repeated
    (fp8(512, 4096, strides=(16, 1)), False),  # rows overlap
    (fp8(512, 64, strides=(1, 512)), False),  # K is not dense
    (fp8(512, 0), False),
    (fp8(0, 512), False),
    (fp8(2**31, 16), False),
]


@pytest.mark.parametrize(("matrix", "readable"), READABLE, ids=str)
def test_what_tma_reads(matrix, readable):
    for target in (SM_90, SM_100):
        assert tma_reads(matrix, target) == readable
    assert not tma_reads(matrix, SM_89)


WIDE = GemmConfig(128, 256, 128, 8, 3, tma=True)


@pytest.mark.parametrize(
    ("n", "item", "width"),
    [
        (6144, 2, 256),  # 384 tiles of 132 programs: 3 turns, or 6 of half the size
        (5120, 2, 128),  # 320 tiles: 3 turns, of which the last is half empty; 5 of half the size
        (28672, 2, 256),  # 14 turns, or 28
        (128, 2, 128),
        (6144, 4, 128),  # an fp32 tile of 256 columns does not fit beside the operands
    ],
)
def test_the_last_turn_of_the_programs_is_filled(n, item, width):
    tile = tile_by_tma(WIDE, 2048, n, item, SM_90)
    assert (tile.block_n, tile.order) == (width, WIDE.order)
    for kind in (Kind.FP8, Kind.FP8_FAST):
        assert config_ok(tile, kind, SM_90)


def test_tma_wants_aligned_addresses(device):
    codes = torch.zeros(4 * 128 + 16, dtype=torch.uint8, device=device).view(FP8)
    for first in (0, 8, 16):
        matrix = codes.as_strided((4, 128), (128, 1), first)
        aligned = matrix.data_ptr() % 16 == 0
        assert tma_reads(matrix, SM_90) == aligned == (first != 8)


@pytest.mark.parametrize(
    ("target", "m", "k", "kernel"),
    [
        (SM_90, MANY, 4096, "gemm_persistent"),
        (SM_90, MANY - 1, 4096, "gemm_epilogue"),
        (SM_90, MANY, 4100, "gemm_epilogue"),
        (SM_90, MANY, 0, "gemm_epilogue"),
        (SM_100, MANY, 4096, "gemm_persistent"),
        (SM_120, MANY, 4096, "gemm_epilogue"),
        (SM_89, MANY, 4096, "gemm_epilogue"),
    ],
)
def test_which_kernel_is_planned(target: Target, m: int, k: int, kernel: str):
    a, b, one = fp8(m, k), fp8(28672, k), torch.empty((), device="meta")
    assert kernels_of(gemm.plan_fp8_gemm(a, b, one, one, None, BF16, target=target)) == [kernel]
    x = torch.empty(m, k, dtype=BF16, device="meta")
    assert kernels_of(gemm.plan_fp8_weight_only(x, b, one, None, target=target)) == [
        "gemm_epilogue"
    ]
