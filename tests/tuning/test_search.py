"""The search: bits before times, one clock, and nothing lost when it is stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mokernels.formats import FORMATS, Activation
from mokernels.ops.config_tables import ANY_M
from mokernels.ops.configs import M_BUCKETS, Kind, choose
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.target import SM_90
from mokernels.tuning import Job, Product, jobs_for, search

PRODUCT = Product(FORMATS["FP8"], Activation.FP8_STATIC, 4096, 4096)
JOBS = jobs_for([PRODUCT], SM_90)


@dataclass
class FakeBench:
    """A device whose times and results the test decides.

    Attributes:
        times: seconds of a configuration.
        broken: reasons for which configurations do not compile.
        wrong: configurations with other bits.
        on_time: called before each time is taken.
    """

    times: Callable[[GemmConfig], float] = lambda config: 1.0
    broken: dict[GemmConfig, str] = field(default_factory=dict)
    wrong: set[GemmConfig] = field(default_factory=set)
    on_time: Callable[[GemmConfig], None] = lambda config: None
    prepared: list[Job] = field(default_factory=list)
    timed: list[GemmConfig] = field(default_factory=list)

    def prepare(self, job: Job) -> None:
        self.prepared.append(job)

    def compile(self, candidates: Sequence[GemmConfig]) -> dict[GemmConfig, str]:
        return {config: why for config, why in self.broken.items() if config in candidates}

    def result(self, config: GemmConfig) -> Tensor:
        return torch.tensor([-0.0 if config in self.wrong else 0.0])

    def seconds(self, config: GemmConfig) -> float:
        self.on_time(config)
        self.timed.append(config)
        return self.times(config)


def test_there_is_a_job_for_each_range_of_rows():
    assert [job.key.rows for job in JOBS] == [*M_BUCKETS, ANY_M]
    assert {job.key.kind for job in JOBS} == {Kind.FP8}
    assert [job.rows for job in JOBS] == [(1, 16), (32,), (64,), (128,), (256,), (512,), (2048,)]
    for job in JOBS:
        assert job.candidates[0] == choose(*job.key, SM_90)


def test_what_is_done_or_the_same_is_left_out():
    assert jobs_for([PRODUCT, PRODUCT], SM_90, [job.key for job in JOBS[:3]]) == JOBS[3:]


def test_the_fastest_wins():
    fast = JOBS[0].candidates[3]
    bench = FakeBench(times=lambda config: 0.5e-6 if config == fast else 1e-6)
    outcome = search(JOBS[:1], bench)
    winner = outcome.winners[JOBS[0].key]
    assert (winner.config, winner.us, winner.closed_form_us) == (fast, 0.5, 1.0)
    assert not outcome.interrupted
    assert outcome.refused == []


def test_what_is_within_the_noise_does_not_win():
    fast = JOBS[0].candidates[1]
    outcome = search(JOBS[:1], FakeBench(times=lambda c: 0.985 if c == fast else 1.0))
    winner = outcome.winners[JOBS[0].key]
    assert winner.config == JOBS[0].candidates[0]
    assert winner.us == winner.closed_form_us


def test_other_bits_never_win_and_are_not_even_timed():
    wrong = JOBS[0].candidates[2]
    bench = FakeBench(times=lambda c: 0.1 if c == wrong else 1.0, wrong={wrong})  # -0 is not 0
    outcome = search(JOBS[:1], bench)
    assert outcome.winners[JOBS[0].key].config == JOBS[0].candidates[0]
    assert wrong not in bench.timed
    (why,) = outcome.refused
    assert why.endswith("its result has not the bits of the closed form's")
    assert str(JOBS[0].key) in why


def test_what_does_not_compile_is_left_out_with_the_reason():
    base, second, *_ = JOBS[0].candidates
    outcome = search(JOBS[:1], FakeBench(broken={second: "OutOfResources: shared memory"}))
    assert "OutOfResources: shared memory" in outcome.refused[0]
    assert JOBS[0].key in outcome.winners
    # Without the closed form's own there is nothing to compare with.
    steps = []
    outcome = search(
        JOBS[:1], FakeBench(broken={base: "no"}), advance=lambda n, what: steps.append(n)
    )
    assert outcome.winners == {}
    assert sum(steps) == len(JOBS[0].candidates)


def test_a_candidate_that_breaks_ends_nothing():
    bad = JOBS[0].candidates[1]

    def on_time(config: GemmConfig) -> None:
        if config == bad:
            raise RuntimeError("out of\nregisters")

    outcome = search(JOBS[:2], FakeBench(on_time=on_time))
    assert set(outcome.winners) == {JOBS[0].key, JOBS[1].key}
    assert outcome.refused[0].endswith("RuntimeError: out of")


def test_an_interrupted_search_keeps_what_it_has():
    kept = {}

    def on_time(config: GemmConfig) -> None:
        if config in JOBS[2].candidates and len(kept) == 2:
            raise KeyboardInterrupt

    outcome = search(JOBS, FakeBench(on_time=on_time), keep=kept.__setitem__)
    assert outcome.interrupted
    assert list(outcome.winners) == list(kept) == [JOBS[0].key, JOBS[1].key]


def test_progress_counts_every_candidate():
    steps: list[int] = []
    search(JOBS, FakeBench(), advance=lambda count, what: steps.append(count))
    assert sum(steps) == sum(len(job.candidates) for job in JOBS)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: str(job.key))
def test_each_candidate_is_timed_once(job):
    bench = FakeBench()
    search([job], bench)
    assert sorted(map(str, bench.timed)) == sorted(map(str, job.candidates))
    assert bench.prepared == [job]
