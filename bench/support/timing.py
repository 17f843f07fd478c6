"""Clocks: how long one call takes, for several contenders that take turns.

Contenders run A B C, C B A, A B C, ... in one process, so that a clock that drops or a neighbour
that wakes up falls on all of them; the median of the rounds is what is reported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any, Protocol

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Batch:
    """Some calls that run as one: ``run`` makes ``count`` of them."""

    run: Call
    count: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: one value for each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The middle half of the rounds lies between these."""
        if len(self.rounds) < 2:
            return self.rounds[0], self.rounds[0]
        low, _, high = quantiles(self.rounds, n=4, method="inclusive")
        return low, high


class Clock(Protocol):
    """Makes batches of calls and times them in turns."""

    def batch(self, calls: Sequence[Call]) -> Batch:
        """Calls that rotate over copies of the weights, ready to be timed."""

    def times(self, batches: Mapping[str, Batch]) -> dict[str, Timing]:
        """Seconds of one call of each batch."""


def turns(names: Sequence[str], rounds: int) -> list[str]:
    """A B C, C B A, A B C, ...: nobody always runs first, or always after the same one."""
    return [name for r in range(rounds) for name in (names if r % 2 == 0 else reversed(names))]


class WallClock:
    """Time of the host: for what runs on the CPU, and for what a launch costs the CPU.

    Args:
        rounds: of every contender.
        seconds: that a round takes at least; a round is at least one call of every copy.
        settle: called after each round, outside its time; waits for a device.
        limit: most calls of a round; on a device they have to fit its queue of launches.
    """

    def __init__(
        self,
        rounds: int = 15,
        seconds: float = 0.05,
        settle: Call = lambda: None,
        limit: int = 10_000,
    ) -> None:
        self.rounds, self.seconds, self.settle, self.limit = rounds, seconds, settle, limit

    def batch(self, calls: Sequence[Call]) -> Batch:
        for call in calls:
            call()
        self.settle()
        once = _elapsed(calls[0])
        self.settle()
        count = repeats(len(calls), once, self.seconds, self.limit)

        def run() -> None:
            for _ in range(count // len(calls)):
                for call in calls:
                    call()

        return Batch(run, count)

    def times(self, batches: Mapping[str, Batch]) -> dict[str, Timing]:
        found: dict[str, list[float]] = {name: [] for name in batches}
        for name in turns(list(batches), self.rounds):
            found[name].append(_elapsed(batches[name].run) / batches[name].count)
            self.settle()
        return {name: Timing(tuple(rounds)) for name, rounds in found.items()}


class GraphClock:
    """Time of a CUDA device: replays of a graph that captured the calls, without the host.

    Args:
        rounds: of every contender.
        seconds: that one replay takes at least.
    """

    def __init__(self, rounds: int = 21, seconds: float = 0.0008) -> None:
        self.rounds, self.seconds = rounds, seconds

    def batch(self, calls: Sequence[Call]) -> Batch:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            once = self._warm(calls, stream)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        count = repeats(len(calls), once, self.seconds, limit=512)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(count // len(calls)):
                for call in calls:
                    call()  # its result is dropped: the next call writes where this one wrote
        graph.replay()
        torch.cuda.synchronize()
        return Batch(graph.replay, count)

    def _warm(self, calls: Sequence[Call], stream: Any) -> float:
        """Compile, tune, fill caches; seconds of a call as far as the stream shows them."""
        for call in calls:
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        for call in calls:
            call()
        end.record(stream)
        stream.synchronize()
        return float(start.elapsed_time(end)) / 1000 / len(calls)

    def times(self, batches: Mapping[str, Batch]) -> dict[str, Timing]:
        order = turns(list(batches), 2 + self.rounds)
        warm = 2 * len(batches)
        events = []
        # Nothing is waited for between replays: a device that never idles hides the launches.
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            batches[name].run()
            end.record()
            events.append((name, start, end))
        torch.cuda.synchronize()
        found: dict[str, list[float]] = {name: [] for name in batches}
        for name, start, end in events[warm:]:
            found[name].append(start.elapsed_time(end) / 1000 / batches[name].count)
        return {name: Timing(tuple(rounds)) for name, rounds in found.items()}


def repeats(copies: int, once: float, seconds: float, limit: int) -> int:
    """How many calls make a round: a multiple of ``copies`` that takes ``seconds`` or more."""
    wanted = min(limit, seconds / max(once, 1e-9))
    return copies * max(1, -(-int(wanted) // copies))


def _elapsed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
