"""Every candidate of a choice computes the closed form's result, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from mokernels.formats import FORMATS, Activation
from mokernels.ops.configs import ANY_M, M_BUCKETS, bucket
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.layer_kinds import kind_of_layer
from mokernels.ops.target import SM_80, SM_89, SM_90, SM_100, Target, target_of
from mokernels.tuning import Job, Product, jobs_for, search
from mokernels.tuning.device import DeviceBench
from tests.kernels.products import few_processors
from tests.support import interpreted_dots
from tests.support.interpreter import interpreting


@dataclass(frozen=True)
class Case:
    """A layer, the number of rows whose range is tried, and the target that chooses."""

    format: str
    activation: Activation
    rows: int
    target: Target

    def __str__(self) -> str:
        rows = "more" if self.rows == ANY_M else self.rows
        return f"{self.format}-{self.activation.value}-{rows}-{self.target.name}"


# Together they launch every kernel of matrix instructions, split and whole, swapped and not, and
# by TMA what the closed form loads from pointers.
CASES = [
    Case("FP8", Activation.FP8_STATIC, 16, SM_90),
    Case("FP8_PER_CHANNEL_PER_TOKEN", Activation.FP8_PER_TOKEN, 256, SM_89),
    Case("FP8_PER_CHANNEL_PER_TOKEN", Activation.FP8_PER_TOKEN, ANY_M, SM_90),
    Case("FP8_PER_CHANNEL_PER_TOKEN", Activation.FP8_PER_TOKEN, 256, SM_90),
    Case("FP8_PB_WO", Activation.FP8_BLOCK, 16, SM_90),
    Case("FP8_PB_WO", Activation.FP8_BLOCK, ANY_M, SM_90),
    Case("FP8_PB_WO", Activation.NONE, 128, SM_80),
    Case("NVFP4", Activation.NVFP4, 16, SM_90),
    Case("NVFP4", Activation.NVFP4, ANY_M, SM_90),
    Case("NVFP4", Activation.NVFP4, 32, SM_100),
    Case("MXFP8", Activation.MXFP8, 64, SM_90),
]
N = 120
FEW_K, MANY_K = 1056, 288
"""Enough blocks of K to be split for few rows; what a last short step takes, for many."""


@pytest.fixture(autouse=True)
def dots_in_order(monkeypatch):
    """The interpreter's dot adds as BLAS does, which looks at the tile; a GPU's does not."""
    if interpreting():
        monkeypatch.setattr(interpreted_dots, "matrix_product", interpreted_dots.product_in_order)


def bench_of(case: Case, device: torch.device) -> tuple[DeviceBench, Job]:
    """A bench with the case's operands, of which results show every bit where they can."""
    target = few_processors(case.target if interpreting() else target_of(device))
    k = FEW_K if case.rows <= 128 else MANY_K
    product = Product(FORMATS[case.format], case.activation, N, k)
    job = next(j for j in jobs_for([product], target) if j.key.rows == case.rows)
    bench = DeviceBench(device, target=target, seconds=lambda call: 1.0, cache_bytes=0)
    bench.prepare(job)
    # The fewest rows of the range, and, where the kind of product allows it, a result in fp32.
    dtype = torch.bfloat16 if case.activation is Activation.NONE else torch.float32
    fewest = max((end for end in M_BUCKETS if end < job.key.rows), default=1) + 1
    few = case.rows == M_BUCKETS[0]  # one row, and as many as a tile has
    bench._inputs = [x.to(dtype) if few else x[:fewest].to(dtype) for x in bench._inputs]
    assert {bucket(x.shape[0]) for x in bench._inputs} == {job.key.rows}
    return bench, job


def different(candidates: tuple[GemmConfig, ...]) -> list[GemmConfig]:
    """Those that the interpreter tells apart: it has neither warps nor a pipeline."""
    if not interpreting():
        return list(candidates)
    tiles = {(c.block_m, c.block_n, c.group_m, c.tma): c for c in reversed(candidates)}
    return list(tiles.values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_candidates_give_the_same_bits(device, case):
    bench, job = bench_of(case, device)
    expected = bench.result(job.candidates[0])
    assert not expected.isnan().any()
    tried = different(job.candidates)
    assert len(tried) >= 2
    for config in tried:
        found = bench.result(config)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), config


def test_another_order_gives_other_bits(device):
    # Else the test above could not fail. Of MXFP8, decoded: sums of NVFP4 codes, and what Hopper's
    # FP8 units leave, have so few bits that fp32 adds them exactly, in whatever order.
    bench, job = bench_of(Case("MXFP8", Activation.MXFP8, 16, SM_90), device)
    base = job.candidates[0]
    assert base.split_k > 1
    found = bench.result(replace(base, split_k=1))
    assert not torch.equal(found, bench.result(base))


def test_the_clock_runs_every_copy(device):
    bench, job = bench_of(CASES[0], device)
    assert job.rows == (1, 16)
    calls = []
    bench._clock = lambda call: calls.append(call) or 3.0
    bench._weights = bench._weights * 3
    assert bench.seconds(job.candidates[0]) == pytest.approx(1.0)
    assert len(calls) == 2


def test_a_gpu_compiles_and_times_candidates(device):
    if interpreting():
        pytest.skip("there is nothing to compile or to time in the interpreter")
    product = Product(FORMATS["FP8"], Activation.FP8_STATIC, 1024, 2048)
    (job, *_) = jobs_for([product], target_of(device))
    job = replace(job, candidates=job.candidates[:3])
    outcome = search([job], DeviceBench(torch.device("cuda", torch.cuda.current_device())))
    assert outcome.refused == []
    winner = outcome.winners[job.key]
    assert winner.config in job.candidates
    assert 1 < winner.us <= winner.closed_form_us < 1000


def test_the_cases_launch_every_kernel_of_matrix_instructions(device, interpreted):
    names = set()
    for case in CASES:
        bench, job = bench_of(case, device)
        with bench._forced(job.candidates[0]):
            for x in bench._inputs:
                names |= {launch.kernel.__name__ for launch in bench._plan(x, bench._weights[0])[1]}
    kernels = ("quantizing", "epilogue", "persistent", "block", "decode", "native")
    assert names >= {f"gemm_{kernel}" for kernel in kernels}
    kinds = {kind_of_layer(FORMATS[c.format], c.activation, c.target) for c in CASES}
    assert len(kinds) == 6
