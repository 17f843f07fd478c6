"""No speed without a right result; no peer without a reason; ratios and files of results."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.support import results
from bench.support.catalog import small_setting
from bench.support.checks import close_check, product_check, relative_error
from bench.support.contest import (
    Case,
    CheckFailedError,
    Contender,
    Contest,
    Peer,
    Setting,
    UnavailableError,
    Work,
    measure,
)
from bench.support.machine import Ceilings, describe
from bench.support.timing import Timing, WallClock, repeats, turns

CPU = torch.device("cpu")
MACHINE = replace(describe(CPU), device="Some GPU 80GB", date="2026-01-31")


@pytest.fixture
def setting() -> Setting:
    return small_setting(CPU)


def case(ours: float, *peers: Peer, target: float | None = None) -> Case:
    """One whose operation returns ``ours``, where 1 is right."""

    def build(setting: Setting) -> Contest:
        check = close_check(torch.ones(4), 0.1)
        return Contest(contender("ours", ours), peers, check, check)

    return Case("case", "group", 1, build, {"m": 1}, target, target_on="cpu", device="any")


def contender(name: str, value: float) -> Contender:
    return Contender(name, [lambda: torch.full((4,), value)], Work(8.0, 32.0))


def unavailable() -> Contender:
    raise UnavailableError("there is none")


@pytest.mark.parametrize("value", [2.0, math.nan, math.inf])
def test_a_wrong_result_gets_no_speed(value: float, setting: Setting) -> None:
    with pytest.raises(CheckFailedError, match="No speed is reported for a wrong result"):
        measure(case(value), setting)


def test_peers_that_do_not_run_are_named(setting: Setting) -> None:
    peers = [
        Peer("right", lambda: contender("right", 1.05)),
        Peer("wrong", lambda: contender("wrong", 1.2)),
        Peer("missing", unavailable),
        Peer("broken", lambda: 1 / 0),
    ]
    row = measure(case(1.0, *peers), setting)
    assert list(row.speeds) == ["ours", "right"]
    assert "off by 2 times" in row.skipped["wrong"]
    assert row.skipped["missing"] == "there is none"
    assert row.skipped["broken"] == "ZeroDivisionError: division by zero"


def test_a_row_without_peers_meets_no_target(setting: Setting) -> None:
    row = measure(case(1.0, Peer("missing", unavailable), target=1.0), setting)
    assert row.ratio is None
    assert row.meets_target is None
    assert "no peer" in results.line(row)


def speed(us: float) -> results.Speed:
    return results.Speed.of(Timing((us / 1e6,)), 2e6, 1e3, 0.5)


def row(target: float | None = 1.25, against: tuple[str, ...] = ()) -> results.Row:
    speeds = {"ours": speed(10.0), "slow": speed(30.0), "fast": speed(12.0)}
    facts = {"tokens_per_call": 4}
    skipped = {"absent": "it cannot be imported"}
    return results.Row("a b", "g", facts, "ours", speeds, skipped, 0.25, target, against)


def test_ratio_is_to_the_best_peer() -> None:
    assert row().best_peer == "fast"
    assert row().ratio == pytest.approx(1.2)
    assert row().meets_target is False
    assert row(target=1.1).meets_target is True
    assert row(against=("slow",)).ratio == pytest.approx(3.0)
    assert row(target=None).meets_target is None


def test_speeds_of_a_call() -> None:
    found = speed(10.0)
    assert found.tflops == pytest.approx(0.2)
    assert found.gbps == pytest.approx(0.1)
    assert row().tokens_per_second == pytest.approx(400_000)


def test_a_line_says_how_fast_and_how_near_the_ceiling() -> None:
    line = results.line(row())
    assert line.startswith("a b: 10 us, 0.2 TFLOPS, 0.1 GB/s, 50 % of the ceiling, 1.20x (target")
    assert line.endswith("| slow 30, fast 12")


def test_files_of_results(tmp_path: Path) -> None:
    ceilings = Ceilings(1e12, {"bf16": 5e14})
    files = results.write(MACHINE, [row()], {"x": "it broke"}, ceilings, folder=tmp_path, part="-2")
    assert [file.name for file in files] == [
        "some-gpu-80gb-2026-01-31-2.json",
        "some-gpu-80gb-2026-01-31-2.md",
    ]
    document = json.loads(files[0].read_text())
    assert document["rows"][0]["ratio"] == 1.2
    assert document["rows"][0]["skipped"] == {"absent": "it cannot be imported"}
    assert document["not_reported"] == {"x": "it broke"}
    table = files[1].read_text()
    assert "| a b | 10 |" in table
    assert "| fast | 12 | 1.20 | 1.25 **missed** |" in table
    assert "absent: it cannot be imported (1 rows)" in table
    assert "x: it broke" in table


def test_results_name_no_folder_and_no_host(tmp_path: Path) -> None:
    for file in results.write(describe(CPU), [row()], {}, folder=tmp_path):
        assert str(Path.home()) not in file.read_text()
        assert str(Path.cwd()) not in file.read_text()


def test_share_of_the_ceiling() -> None:
    ceilings = Ceilings(1e12, {"bf16": 1e14, "fp8": 2e14})
    assert ceilings.share(2e-6, flops=0, moved=1e6, unit="fp8") == pytest.approx(0.5)
    assert ceilings.share(2e-6, flops=2e8, moved=1, unit="fp8") == pytest.approx(0.5)
    # A device without FP8 units does it with bf16.
    assert Ceilings(1e12, {"bf16": 1e14}).share(4e-6, 2e8, 1, "fp8") == pytest.approx(0.5)


def test_contenders_take_turns() -> None:
    assert turns(["a", "b", "c"], 3) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_a_round_calls_every_copy_equally() -> None:
    assert repeats(copies=3, once=1.0, seconds=0.5, limit=100) == 3
    assert repeats(copies=3, once=0.1, seconds=1.0, limit=100) == 12
    assert repeats(copies=3, once=1e-9, seconds=1.0, limit=100) == 102
    seen: list[int] = []
    clock = WallClock(rounds=2, seconds=0.0)
    batch = clock.batch([lambda: seen.append(0), lambda: seen.append(1)])
    clock.times({"a": batch})
    assert seen.count(0) == seen.count(1) + 1  # one more: how long a call takes was tried once


def test_product_check_sees_one_wrong_value() -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 64, generator=draw), torch.randn(8, 64, generator=draw)
    check = product_check(x, weight, fp8_units=True)
    y = (x.double() @ weight.double().T).to(torch.bfloat16)
    assert check(y) <= 1
    # The largest: 2 % of a sum that nearly cancels are less than the order of addition may make.
    largest = divmod(int(y.abs().argmax()), 8)
    y[largest] *= 1.02
    assert check(y) > 1
    y[largest] = math.nan
    assert check(y) == math.inf


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.8)
    assert relative_error(torch.ones(2), torch.ones(3)) == math.inf
    assert close_check([torch.ones(2)], 0.1)([torch.ones(2), torch.ones(2)]) == math.inf
