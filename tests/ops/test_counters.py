"""Who owns the counters of split-K launches: no two launches that may run at a time share one."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from mokernels.ops.launch import counters
from mokernels.ops.launch.counters import LOW, OF_STREAM, RESERVED, Counters, counters_for

CPU = torch.device("cpu")


class Device:
    """What the module asks a device, answered; ``reserves`` were made for it."""

    def __init__(self):
        self.stream = 0
        self.capturing = False
        self.reserves: list[Tensor] = []

    def lasting_zeros(self, count: int, _: torch.device) -> Tensor:
        assert not self.capturing, "would become a node of the graph"
        self.reserves.append(torch.zeros(count, dtype=torch.int32))
        return self.reserves[-1]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    monkeypatch.setattr(counters, "is_capturing", lambda _: made.capturing)
    monkeypatch.setattr(counters, "current_stream", lambda _: made.stream)
    monkeypatch.setattr(counters, "lasting_zeros", made.lasting_zeros)
    return made


def addresses(found: Tensor) -> set[int]:
    return set(range(found.data_ptr(), found.data_ptr() + 4 * found.numel(), 4))


def assert_disjoint(*all_found: Tensor) -> None:
    for first, second in combinations(all_found, 2):
        assert not addresses(first) & addresses(second)


def test_launches_of_a_stream_share_their_counters(device):
    owned = Counters(CPU)
    first, second = owned.for_launch(3), owned.for_launch(OF_STREAM)
    assert addresses(first) == addresses(second)
    assert first.dtype == torch.int32
    assert not first.any()


def test_streams_share_none(device):
    owned, found = Counters(CPU), []
    for device.stream in (0, 1, 2):
        found.append(owned.for_launch(3))
    assert_disjoint(*found)
    device.stream = 1
    assert addresses(owned.for_launch(3)) == addresses(found[1])


def test_a_larger_launch_of_a_stream_gets_more(device):
    owned = Counters(CPU)
    owned.for_launch(3)
    large = owned.for_launch(RESERVED + 5)
    assert large.numel() == RESERVED + 5
    assert not large.any()
    assert addresses(owned.for_launch(3)) == addresses(large)


def test_captured_launches_share_none(device):
    owned = Counters(CPU)
    eager = owned.for_launch(3)
    device.capturing = True
    captured = [owned.for_launch(tiles) for tiles in (3, 3, 7)]
    assert [found.numel() for found in captured] == [3, 3, 7]
    assert_disjoint(eager, *captured)
    # Other addresses would take another kernel, compiled inside of the capture.
    start = device.reserves[0].data_ptr()
    assert [(found.data_ptr() - start) % 16 for found in (eager, *captured)] == [0] * 4
    device.capturing = False
    assert addresses(owned.for_launch(3)) == addresses(eager)
    assert len(device.reserves) == 1


@pytest.mark.parametrize("warmed_up", [False, True])
def test_a_capture_without_a_reserve_sets_its_own_to_zero(device, warmed_up):
    owned = Counters(CPU)
    if warmed_up:
        owned.for_launch(3)
    device.capturing = True
    found = [owned.for_launch(RESERVED) for _ in range(2)]
    assert_disjoint(*found)
    assert len(device.reserves) == warmed_up
    assert_disjoint(*found, *device.reserves)


def test_a_used_reserve_is_replaced_outside_of_captures(device):
    owned = Counters(CPU)
    eager = owned.for_launch(3)
    device.capturing = True
    captured = owned.for_launch(RESERVED - LOW)
    device.capturing = False
    owned.for_launch(3)
    assert len(device.reserves) == 2
    device.capturing = True
    assert_disjoint(eager, captured, owned.for_launch(RESERVED))


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_what_has_no_streams_gets_new_zeros(kind):
    first, second = (counters_for(torch.device(kind), 5) for _ in range(2))
    assert first.shape == (5,)
    assert first is not second
    assert kind == "meta" or not first.any()
