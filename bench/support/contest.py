"""A contest: one operation of ours, its peers, and the check that both have to pass.

``measure`` is the only way to a speed: it checks results first, and raises CheckFailedError
instead of timing an operation of ours that is wrong. A peer that cannot run or is wrong is left out
by name, with the reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.support.machine import Ceilings
from bench.support.results import Row, Speed
from bench.support.timing import Batch, Call, Clock


class CheckFailedError(AssertionError):
    """An operation of ours computes something else than mokernels.numerics says."""


class UnavailableError(Exception):
    """A peer cannot run here; the message is the reason that results show."""


@dataclass(frozen=True)
class Work:
    """What one call has to do at least.

    Attributes:
        flops: additions and multiplications of its products.
        moved: bytes of weights, activations and results, each once.
        unit: matrix units that could do it fastest: "fp8" or "bf16".
    """

    flops: float
    moved: float
    unit: str = "bf16"


@dataclass(frozen=True)
class Contender:
    """Somebody's way to do it.

    Attributes:
        name: in results.
        calls: one for each copy of the weights.
        work: of one call.
        seen: what the check sees of a call's result.
    """

    name: str
    calls: Sequence[Call]
    work: Work
    seen: Callable[[Any], Any] = lambda result: result


@dataclass(frozen=True)
class Peer:
    """A contender that may not be available: ``make`` raises UnavailableError, or anything."""

    name: str
    make: Callable[[], Contender]


Check = Callable[[Any], float]
"""Takes a result; returns its error as a share of what is allowed (above 1, or NaN: wrong)."""


@dataclass
class Contest:
    """Who runs, and what is right.

    Attributes:
        ours: the operation of mokernels.
        peers: who to compare with.
        check: of our result.
        check_peer: of a peer's; wider, since peers round where they like.
    """

    ours: Contender
    peers: Sequence[Peer]
    check: Check
    check_peer: Check


@dataclass
class Setting:
    """Where and how contests are held.

    Attributes:
        device: that runs them.
        clock: of the device.
        host_clock: of what a call costs the host.
        backend: that compiles peers and models.
        cache_bytes: copies of weights add up to more than four times this.
        small: shapes are shrunk to a few thousand elements, to try the benchmarks themselves.
        kept: models that several contests use; forgotten when another group begins.
    """

    device: torch.device
    clock: Clock
    host_clock: Clock
    measure_ceilings: Callable[[], Ceilings]
    backend: str = "inductor"
    cache_bytes: int = 0
    small: bool = False
    kept: dict[Any, Any] = field(default_factory=dict)
    _ceilings: list[Ceilings] = field(default_factory=list)

    def __post_init__(self) -> None:
        # One function is compiled for many shapes. Beyond its limit Dynamo would run it eagerly.
        torch._dynamo.config.recompile_limit = 4096
        torch._dynamo.config.accumulated_recompile_limit = 65536

    @property
    def ceilings(self) -> Ceilings:
        if not self._ceilings:
            self._ceilings.append(self.measure_ceilings())
        return self._ceilings[0]

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled for the shapes it meets first, as a user would who cares for speed."""
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self.backend)

    def copies(self, size: int) -> int:
        """How many copies of ``size`` bytes make no cache hold what the next call reads."""
        return 1 + min(64, 4 * self.cache_bytes // max(1, size))

    def keep(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` returned for this key, now or before."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def release(self, *, kept: bool = True) -> None:
        """Give the last contest's memory back, and with ``kept`` also the models."""
        if kept:
            self.kept.clear()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Case:
    """One row of results, before it is measured.

    Attributes:
        name: unique.
        group: rows that stand in one table.
        tier: when it is run: lower ones first.
        build: makes the contest.
        facts: shape and format, for readers of the JSON.
        target: least ratio to the best peer that the project wants; None where it states none.
        against: names of the peers that ``target`` speaks of; all when empty.
        device: type of the device that it is about: "cuda", "cpu" or "any".
        target_on: type of the device that ``target`` speaks of.
        host: what the host's clock measures, not the device's.
    """

    name: str
    group: str
    tier: int
    build: Callable[[Setting], Contest]
    facts: dict[str, Any]
    target: float | None = None
    against: tuple[str, ...] = ()
    device: str = "cuda"
    target_on: str = "cuda"
    host: bool = False

    def runs_on(self, device: torch.device) -> bool:
        return self.device in ("any", device.type)


def measure(case: Case, setting: Setting) -> Row:
    """Check, then time.

    Raises:
        CheckFailedError: the result of ours is wrong; nothing was timed.
    """
    with torch.no_grad():
        contest = case.build(setting)
        error = _checked(case, contest)
        clock = setting.host_clock if case.host else setting.clock
        contenders, batches, skipped = [contest.ours], {}, {}
        batches[contest.ours.name] = clock.batch(contest.ours.calls)
        for peer in contest.peers:
            entered = _enter(peer, contest.check_peer, clock)
            if isinstance(entered, str):
                skipped[peer.name] = entered
            else:
                contenders.append(entered[0])
                batches[peer.name] = entered[1]
        times = clock.times(batches)
    speeds = {
        c.name: Speed.of(times[c.name], c.work.flops, c.work.moved, _share(c, times, setting))
        for c in contenders
    }
    return Row(
        case=case.name,
        group=case.group,
        facts=case.facts,
        ours=contest.ours.name,
        speeds=speeds,
        skipped=skipped,
        error=error,
        target=case.target if case.target_on == setting.device.type else None,
        against=case.against,
    )


def _checked(case: Case, contest: Contest) -> float:
    error = 0.0
    for call in contest.ours.calls[:2]:
        error = max(error, contest.check(contest.ours.seen(call())), key=_nan_last)
    if not error <= 1:
        raise CheckFailedError(
            f"{case.name}: {contest.ours.name} is off by {error:.3g} times what its check allows. "
            "No speed is reported for a wrong result; run the tests of this operator first."
        )
    return error


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def _enter(peer: Peer, check: Check, clock: Clock) -> tuple[Contender, Batch] | str:
    """The peer, ready to be timed, or why it is not."""
    try:
        contender = peer.make()
        error = check(contender.seen(contender.calls[0]()))
        if not error <= 1:
            return f"its result is off by {error:.3g} times what the check of peers allows"
        return contender, clock.batch(contender.calls)
    except UnavailableError as reason:
        return str(reason)
    except Exception as error:  # whatever a peer raises is its reason, and no end of our run
        return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"


def _share(contender: Contender, times: Any, setting: Setting) -> float | None:
    work = contender.work
    if not (work.flops or work.moved):
        return None
    return setting.ceilings.share(times[contender.name].median, work.flops, work.moved, work.unit)
