"""The clock of CUDA devices, with a device that only counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench.support.timing import GraphClock


class Device:
    """What a CUDA device does for the clock: time passes with each call that runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.recording: list[Any] | None = None

    def call(self, seconds: float) -> Any:
        def run() -> None:
            if self.recording is not None:
                self.recording.append(run)
            else:
                self.now += seconds

        return run

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return Event(self)

    @contextmanager
    def graph(self, graph: Graph, stream: Any) -> Iterator[None]:
        self.recording = graph.calls
        yield
        self.recording = None


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self, stream: Any = None) -> None:
        self.at = self.device.now

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end.at - self.at)


class Graph:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


class Stream:
    def wait_stream(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...


@contextmanager
def on(stream: Any) -> Iterator[None]:
    yield


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": on,
        "synchronize": lambda: None,
        "Event": made.event,
        "CUDAGraph": Graph,
        "graph": made.graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_seconds_of_a_call(device: Device) -> None:
    clock = GraphClock(rounds=5, seconds=0.001)
    fast = clock.batch([device.call(10e-6), device.call(30e-6)])
    slow = clock.batch([device.call(0.5)])
    assert (fast.count, slow.count) == (50, 1)
    times = clock.times({"fast": fast, "slow": slow})
    assert len(times["fast"].rounds) == 5
    assert times["fast"].median == pytest.approx(20e-6)
    assert times["slow"].quartiles == pytest.approx((0.5, 0.5))


def test_nothing_runs_while_a_graph_is_captured(device: Device) -> None:
    before = device.now
    batch = GraphClock(seconds=0.0).batch([device.call(1.0)])
    # Two calls to warm up and estimate, one replay.
    assert device.now - before == pytest.approx(3.0)
    assert batch.count == 1
