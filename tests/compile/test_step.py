"""Replaying a step from fixed buffers."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mokernels.compile.step import CudaGraphs, Steps
from mokernels.errors import ArgumentError, BackendError
from tests.support.recorded import Recorded


class Counter:
    """A state that a step changes, and that can be brought back."""

    def __init__(self) -> None:
        self.total = torch.zeros(2)
        self.rewinds = 0

    def step(self, x: torch.Tensor, twice: bool = False, **rest: object) -> dict:
        self.total.add_(x * (2 if twice else 1))
        return {"total": self.total.clone()}

    def rewinder(self):
        before = self.total.clone()

        def rewind():
            self.rewinds += 1
            self.total.copy_(before)

        return rewind


def test_a_step_is_recorded_once_and_replayed_with_new_inputs():
    counter, capture = Counter(), Recorded()
    steps = Steps(capture)
    for value in (1.0, 2.0, 4.0):
        found = steps(counter.step, {"x": torch.full((2,), value)}, None, counter.rewinder)
        assert torch.equal(found["total"], counter.total)
    assert counter.total.tolist() == [7, 7]
    assert capture.count == len(steps) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.ones(1)},
        {"x": torch.ones(2, dtype=torch.float64)},
        {"x": torch.ones(2), "twice": True},
        {"x": torch.ones(2), "more": torch.ones(2)},
    ],
    ids=["shape", "dtype", "constant", "argument"],
)
def test_anything_but_contents_is_recorded_apart(other):
    counter, capture = Counter(), Recorded()
    steps = Steps(capture)
    steps(counter.step, {"x": torch.ones(2), "twice": False}, None, counter.rewinder)
    steps(counter.step, other, None, counter.rewinder)
    assert capture.count == 2
    steps(counter.step, other, "another state", counter.rewinder)
    assert capture.count == 3


def test_inputs_in_dicts_and_tuples_are_copied_too():
    counter, steps = Counter(), Steps(Recorded())

    def step(masks):
        return counter.step(masks["full"][0])

    for value in (1.0, 2.0):
        masks = {"full": (torch.full((2,), value), None)}
        steps(step, {"masks": masks}, None, counter.rewinder)
    assert counter.total.tolist() == [3, 3]


def test_an_input_that_cannot_be_compared_is_refused():
    counter, steps = Counter(), Steps(Recorded())
    given = {"x": torch.ones(2), "mask": object()}
    with pytest.raises(ArgumentError, match=r"given a object, wanted tensors.*cuda_graphs=False"):
        steps(counter.step, given, None, counter.rewinder)
    assert counter.total.tolist() == [0, 0]


def test_a_number_that_counts_up_is_refused_in_the_end():
    counter, steps = Counter(), Steps(Recorded())
    for position in range(32):
        steps(counter.step, {"x": torch.ones(2), "n": position}, None, counter.rewinder)
    with pytest.raises(ArgumentError, match="32 CUDA graphs were captured of one model's"):
        steps(counter.step, {"x": torch.ones(2), "n": 32}, None, counter.rewinder)
    steps(counter.step, {"x": torch.ones(2), "n": 31}, None, counter.rewinder)


class Device:
    """``torch.cuda`` as far as a capture needs it, writing down what happens in which order."""

    def __init__(self, monkeypatch) -> None:
        self.events: list[str] = []
        for name in ("device", "stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, partial(self.within, name))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: Stream("side", self.events))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("current", self.events))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        replay = partial(self.events.append, "replay")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=replay))

    @contextmanager
    def within(self, name, *args, **kwargs):
        assert name != "graph" or args[1] == "pool"
        assert name != "graph" or kwargs == {"capture_error_mode": "thread_local"}
        self.events.append(name)
        yield
        self.events.append(f"/{name}")


class Stream:
    def __init__(self, name, events) -> None:
        self.name, self.events = name, events

    def wait_stream(self, other) -> None:
        self.events.append(f"{self.name} waits for {other.name}")


def test_a_cuda_graph_is_captured_warm_and_rewound(monkeypatch):
    device = Device(monkeypatch)
    capture = CudaGraphs(torch.device("cuda", 0))
    run, rewind = (partial(device.events.append, name) for name in ("run", "rewind"))
    replay, result = capture(run, rewind)
    assert result is None
    replay()
    warm = ["side waits for current", "stream", *["run", "rewind"] * 2, "/stream"]
    captured = ["current waits for side", "graph", "run", "/graph", "rewind"]
    assert device.events == ["device", *warm, *captured, "/device", "replay"]


def test_what_a_cuda_graph_cannot_hold_is_said(monkeypatch):
    device = Device(monkeypatch)

    def run():
        if device.events[-1] == "graph":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(BackendError, match=r"not permitted when stream.*Pass cuda_graphs=False"):
        CudaGraphs(torch.device("cuda", 0))(run, lambda: None)


def test_the_stand_in_refuses_what_a_graph_refuses():
    steps = Steps(Recorded())

    def waits(x):
        return {"total": x * float(x.sum())}

    with pytest.raises(AssertionError, match="makes the host wait"):
        steps(waits, {"x": torch.ones(2)}, None, Counter().rewinder)
