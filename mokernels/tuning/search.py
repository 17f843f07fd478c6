"""The search: every candidate of every product, checked to the bit, then timed one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from mokernels.ops import configs
from mokernels.ops.candidates import candidates_of
from mokernels.ops.config_tables import ANY_M
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.layer_kinds import kind_of_layer
from mokernels.ops.table_files import Key, Winner
from mokernels.ops.target import Target
from mokernels.tuning.products import Product

BUCKETS = (*configs.M_BUCKETS, ANY_M)
MANY_ROWS = 2048
"""Rows that stand for the last range of M, a prompt's."""
NOISE = 0.02
"""A candidate wins by more than this share of the time; less is not told apart from chance."""


@dataclass(frozen=True)
class Job:
    """One product with one range of M.

    Attributes:
        product: what is multiplied.
        key: what a table calls it.
        candidates: what to try, the closed form's choice first.
    """

    product: Product
    key: Key
    candidates: tuple[GemmConfig, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of rows that are measured: the end of the range, and one row, decoding's own."""
        if self.key.rows == BUCKETS[0]:
            return 1, self.key.rows
        return (MANY_ROWS if self.key.rows == ANY_M else self.key.rows,)


@dataclass
class Outcome:
    """What a search found.

    Attributes:
        winners: by product; where nothing was faster, the closed form's choice.
        refused: candidates that were left out, with the reason: they do not compile, or differ.
        interrupted: the search was stopped before its end.
    """

    winners: dict[Key, Winner] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    interrupted: bool = False


class DifferentBitsError(Exception):
    """A candidate computes other bits than the closed form: it may not win."""


class Bench(Protocol):
    """Runs one product at a time on a device."""

    def prepare(self, job: Job) -> None:
        """Draw activations and weights; what was drawn before is forgotten."""

    def compile(self, candidates: Sequence[GemmConfig]) -> dict[GemmConfig, str]:
        """Compile all of them, many at a time; those that cannot be, with the reason."""

    def result(self, config: GemmConfig) -> Tensor:
        """The products of all numbers of rows, one below the other, with this configuration."""

    def seconds(self, config: GemmConfig) -> float:
        """Time of one call with this configuration, the mean over the numbers of rows."""


def jobs_for(
    products: Iterable[Product], target: Target, done: Iterable[Key] = ()
) -> tuple[Job, ...]:
    """What there is to measure: products that have candidates, in each range of M.

    Args:
        products: of a checkpoint.
        target: the device.
        done: what was measured before and is left out.
    """
    skipped = set(done)
    jobs: dict[Key, Job] = {}
    for product in products:
        kind = kind_of_layer(product.format, product.activation, target)
        for rows in BUCKETS:
            key = Key(kind, rows, product.n, product.k)
            found = candidates_of(configs.choose(*key, target), kind, target)
            if key not in skipped and len(found) > 1:
                jobs.setdefault(key, Job(product, key, found))
    return tuple(jobs.values())


def search(
    jobs: Iterable[Job],
    bench: Bench,
    *,
    advance: Callable[[int, str], None] = lambda steps, what: None,
    keep: Callable[[Key, Winner], None] = lambda key, winner: None,
) -> Outcome:
    """Measure the jobs in turn.

    A candidate may win only if its result has every bit of the closed form's.

    Args:
        jobs: from :func:`jobs_for`.
        bench: the device.
        advance: told how many candidates are done, and what is measured.
        keep: given each winner as soon as it is known.

    Returns:
        The outcome; a KeyboardInterrupt ends the search, and what was found is kept.
    """
    outcome = Outcome()
    try:
        for job in jobs:
            advance(0, str(job.key))
            winner = _fastest(job, bench, outcome, advance)
            if winner is not None:
                outcome.winners[job.key] = winner
                keep(job.key, winner)
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome


def _fastest(
    job: Job, bench: Bench, outcome: Outcome, advance: Callable[[int, str], None]
) -> Winner | None:
    """None if the closed form's own choice cannot be measured."""
    base, *others = job.candidates
    bench.prepare(job)
    broken = bench.compile(job.candidates)
    outcome.refused += [f"{job.key}: {config}: {why}" for config, why in broken.items()]
    if base in broken:
        advance(len(job.candidates), str(job.key))
        return None
    expected, times = bench.result(base), {base: bench.seconds(base)}
    advance(1, str(job.key))
    for config in others:
        if config not in broken:
            try:
                times[config] = _checked_seconds(config, bench, expected)
            except Exception as error:  # the next candidate may be all right
                outcome.refused.append(f"{job.key}: {config}: {error_line(error)}")
        advance(1, str(job.key))
    best = min(times, key=times.__getitem__)
    if times[best] > (1 - NOISE) * times[base]:
        best = base
    return Winner(best, 1e6 * times[best], 1e6 * times[base])


def _checked_seconds(config: GemmConfig, bench: Bench, expected: Tensor) -> float:
    if not _same_bits(bench.result(config), expected):
        raise DifferentBitsError("its result has not the bits of the closed form's")
    return bench.seconds(config)


def error_line(error: BaseException) -> str:
    """The first line of what went wrong."""
    if isinstance(error, DifferentBitsError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"


def _same_bits(found: Tensor, expected: Tensor) -> bool:
    """Whether two results are one; -0 is not 0, and a NaN is that of the same bits."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
    return bool(torch.equal(first, second))
