"""Batch invariance of the kernels: a row of a batch equals the row alone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mokernels.invariance import batch_invariant
from mokernels.ops import launch
from mokernels.ops.configs import choose
from mokernels.ops.launch import decode, gemm
from mokernels.ops.launch.fused import plan_norm_quantize
from mokernels.ops.launch.linear import plan_mxfp8_linear
from mokernels.ops.launch.plan import run
from mokernels.ops.target import Target
from tests.kernels.products import BF16, FP16, FP32, TARGETS, Draw, few_processors
from tests.support import interpreted_dots
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting

N = 50
K = 1056
"""Short last steps, and enough of them that one row is split, with few processors."""
ROWS = (1, 2, 17, 65, 130)
"""Of every kind of choice: one row, few, parallel parts of several tiles, serial parts."""


@pytest.fixture(autouse=True)
def dots_in_order(monkeypatch):
    """The interpreter's dot adds as BLAS does, which looks at the tile; a GPU's does not."""
    if interpreting():
        monkeypatch.setattr(interpreted_dots, "matrix_product", interpreted_dots.product_in_order)


Run = Callable[..., Tensor]


def fp8_linear(draw: Draw, k: int) -> Run:
    weight, scale, bias = draw.e4m3(N, k), draw.scale(N), draw.bias(N, BF16)
    one = torch.tensor(2.0 / 448, device=draw.device)
    return lambda x, target: launch.fp8_linear(x, weight, scale, one, bias, target=target)


def fp8_per_token_linear(draw: Draw, k: int) -> Run:
    weight, scale, bias = draw.e4m3(N, k), draw.scale(N), draw.bias(N, BF16)
    return lambda x, target: launch.fp8_per_token_linear(x, weight, scale, bias, target=target)


def fp8_block_linear(draw: Draw, k: int) -> Run:
    weight, scale = draw.e4m3(N, k), draw.scale(-(-N // 128), -(-k // 128))
    return lambda x, target: launch.fp8_block_linear(x, weight, scale, target=target)


def nvfp4_linear(draw: Draw, k: int) -> Run:
    weight = (draw.packed(N, k // 2), draw.block_scale(N, k // 16), draw.scale())
    one = draw.scale() * 2.0**-4
    return lambda x, target: launch.nvfp4_linear(x, *weight, one, target=target)


def mxfp8_linear(draw: Draw, k: int) -> Run:
    weight, bias = (draw.e4m3(N, k), draw.exponents(N, k // 32)), draw.bias(N, FP32)
    return lambda x, target: launch.mxfp8_linear(x, *weight, bias, target=target)


def fp8_fast_gemm(draw: Draw, k: int) -> Run:
    weight, scale = draw.e4m3(N, k), draw.scale(N)

    def run(x: Tensor, target: Target) -> Tensor:
        codes, scale_x = launch.quantize_fp8_per_token(x, target=target)
        given = (codes, weight, scale_x, scale, None, "float32", True)
        return launch.fp8_gemm(*given, target=target)

    return run


def fp8_weight_only(draw: Draw, k: int) -> Run:
    weight, scale = draw.e4m3(N, k), draw.scale(N)
    return lambda x, target: launch.fp8_weight_only_gemm(x, weight, scale, target=target)


def block_weight_only(draw: Draw, k: int) -> Run:
    weight, scale = draw.e4m3(N, k), draw.scale(-(-N // 128), -(-k // 128))
    return lambda x, target: launch.fp8_weight_only_gemm(x, weight, scale, target=target)


def nvfp4_weight_only(draw: Draw, k: int) -> Run:
    weight = (draw.packed(N, k // 2), draw.block_scale(N, k // 16), draw.scale())
    return lambda x, target: launch.nvfp4_weight_only_gemm(
        x, *weight, out_dtype="float32", target=target
    )


def mxfp8_weight_only(draw: Draw, k: int) -> Run:
    weight = (draw.e4m3(N, k), draw.exponents(N, k // 32))
    return lambda x, target: launch.mxfp8_weight_only_gemm(
        x, *weight, out_dtype="float32", target=target
    )


# Name: how it is made, the dtype of x, and K. Results in fp32 show every bit.
OPERATORS: dict[str, tuple[Callable[[Draw, int], Run], torch.dtype, int]] = {
    "fp8_linear": (fp8_linear, FP32, K),
    "fp8_per_token_linear": (fp8_per_token_linear, FP32, K),
    "fp8_block_linear": (fp8_block_linear, FP32, K),
    "nvfp4_linear": (nvfp4_linear, FP32, 2080),  # the longest steps
    "fp8_weight_only_gemm": (fp8_weight_only, FP16, K),
    "fp8_gemm, fast": (fp8_fast_gemm, FP32, K),
    "nvfp4_weight_only_gemm": (nvfp4_weight_only, BF16, K),
    "mxfp8_weight_only_gemm": (mxfp8_weight_only, BF16, K),
    "mxfp8_linear": (mxfp8_linear, FP32, K),
    "fp8_weight_only_gemm, blocks": (block_weight_only, BF16, K),
    "fp8_weight_only_gemm, fp32": (fp8_weight_only, FP32, 544),
    "mxfp8_weight_only_gemm, fp32": (mxfp8_weight_only, FP32, 544),
}
# Each operator on two of the interpreter's targets, neighbours in their order, and each target with
# several; NVFP4's and MXFP8's own on one that decodes them and one that does not. A GPU runs all.
PAIRS = [
    pytest.param(target, name, id=f"{name}-{target.name}")
    for row, name in enumerate(OPERATORS)
    for column, target in enumerate(TARGETS)
    if (row + column) % len(TARGETS) < 2
]
every_target = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def test_linears_with_block_scales_are_tried_natively_and_decoded():
    for name in ("nvfp4_linear", "mxfp8_linear"):
        native = {p.values[0].has_nvfp4_dot for p in PAIRS if p.values[1] == name}
        assert native == {target.has_nvfp4_dot for target in TARGETS}


def drawn(device: torch.device, name: str) -> tuple[Run, Tensor]:
    """An operator with its weight, and activations of as many rows as the largest batch."""
    make, dtype, k = OPERATORS[name]
    draw = Draw(device, len(name))
    return make(draw, k), draw.normal(max(ROWS), k, dtype=dtype)


def differing(run: Run, x: Tensor, target: Target) -> list[int]:
    """The batches (numbers of rows) in which some row has not the bits that it has alone."""
    alone = {row - 1: run(x[row - 1 : row], target) for row in ROWS}
    found = []
    for m in ROWS[1:]:
        batch = run(x[:m], target)
        assert not batch.isnan().any()
        if not all(torch.equal(batch[row : row + 1], alone[row]) for row in alone if row < m):
            found.append(m)
    return found


@pytest.mark.parametrize(("target", "name"), PAIRS)
def test_a_row_of_a_batch_is_the_row_alone(device, target, name):
    run, x = drawn(device, name)
    with batch_invariant():
        assert differing(run, x, few_processors(target)) == []


@every_target
@pytest.mark.parametrize("name", ["fp8_linear", "mxfp8_weight_only_gemm"])
def test_without_the_mode_it_is_not(device, target, name):
    if name == "fp8_linear" and target.promotes_accumulator and not interpreting():
        pytest.skip("sums of FP8 products have so few bits on Hopper that fp32 adds them exactly")
    run, x = drawn(device, name)
    assert differing(run, x, few_processors(target)) != []


class Chosen:
    """Stands in for ``choose``: as it is, or with the parts of K in parallel; keeps the splits."""

    def __init__(self, parallel: bool):
        self.parallel = parallel
        self.splits: list[tuple[str | None, int]] = []

    def __call__(self, *arguments):
        config = choose(*arguments)
        if self.parallel:
            config = replace(config, serial=False)
        self.splits.append((config.split, config.split_k))
        return config


@every_target
@pytest.mark.parametrize("name", ["fp8_linear", "fp8_block_linear", "nvfp4_linear"])
def test_serial_parts_are_added_as_parallel_ones(device, target, name, monkeypatch):
    run, x = drawn(device, name)
    results, splits = [], []
    for parallel in (False, True):
        chosen = Chosen(parallel)
        for module in (gemm, decode):
            monkeypatch.setattr(module, "choose", chosen)
        with batch_invariant():
            results.append(run(x, few_processors(target)))
        splits += chosen.splits
    (serial, parts), (parallel, same_parts) = splits
    assert serial == "serial"
    assert parallel in ("last", "parts")
    assert parts == same_parts > 1
    assert_same_bits(*results)


@every_target
def test_serial_parts_take_no_workspace(device, target):
    draw = Draw(device, 1)
    x, weight = draw.normal(130, K), (draw.e4m3(N, K), draw.exponents(N, K // 32))
    for invariant in (False, True):
        planned = plan_mxfp8_linear(
            x, *weight, None, target=few_processors(target), invariant=invariant
        )
        kernels = [one.kernel.__name__ for one in planned[1]]
        assert kernels[0] == "quantize_blocks"
        assert len(kernels) == 2
        assert planned[1][1].constants["SPLIT"] == ("serial" if invariant else None)
    result = run(planned)
    assert not result.isnan().any()


@every_target
@pytest.mark.parametrize("k", [96, 4096, 20_000])
def test_norms_are_added_in_an_order_of_k_alone(device, target, k):
    seen = set()
    for m in ROWS:
        for one in (target, few_processors(target)):
            x, weight = (torch.empty(*s, k, dtype=BF16, device="meta") for s in ((m,), ()))
            arguments = ("fp8_per_token", x, None, weight, 1e-6, "cast_then_scale")
            _, (planned,) = plan_norm_quantize(*arguments, target=one)
            seen.add((str(planned.constants), planned.num_warps, planned.fp_fusion))
    assert len(seen) == 1


@pytest.mark.parametrize("target", TARGETS[::2], ids=lambda target: target.name)
@pytest.mark.parametrize("quantizer", ["fp8_per_token", "mxfp8"])
def test_fused_activations_need_no_mode(device, target, quantizer):
    draw = Draw(device, 2)
    gate, up, weight = (draw.normal(*s, 288, dtype=BF16) for s in ((130,), (130,), ()))
    gated = lambda rows: launch.gated_quantize(  # noqa: E731
        quantizer, gate[rows], up[rows], "silu", target=target
    )
    norm = lambda rows: launch.add_rms_norm_quantize(  # noqa: E731
        quantizer, gate[rows], up[rows], weight, 1e-6, "cast_then_scale", target=target
    )
    for call in (gated, norm):
        batch = call(slice(None))
        for row in (0, 77, 129):
            for whole, alone in zip(batch, call(slice(row, row + 1)), strict=True):
                assert_same_bits(*(t.view(torch.uint8) for t in (alone, whole[row : row + 1])))


def test_the_mode_is_asked_at_every_call(device):
    run, x = drawn(device, "mxfp8_weight_only_gemm")
    target = few_processors(TARGETS[0])
    outside = run(x, target)
    with batch_invariant():
        inside = run(x, target)
    assert not torch.equal(inside, outside)
    assert_same_bits(run(x, target), outside)
