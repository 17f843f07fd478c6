"""Replaying a step from fixed buffers."""

import pytest
import torch

from mokernels.compile.step import Steps
from mokernels.errors import ArgumentError
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


def test_the_stand_in_refuses_what_a_graph_refuses():
    steps = Steps(Recorded())

    def waits(x):
        return {"total": x * float(x.sum())}

    with pytest.raises(AssertionError, match="makes the host wait"):
        steps(waits, {"x": torch.ones(2)}, None, Counter().rewinder)
