"""``pytest bench/``: benchmarks on, one process, and a line that says what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.support import results
from bench.support.catalog import (
    note_for,
    present_device,
    setting_for,
    small_setting,
    what_runs,
)
from bench.support.contest import Case, Setting, measure
from bench.support.machine import describe

HERE = Path(__file__).parent
ROWS = pytest.StashKey[list[results.Row]]()


class Player:
    """A clock for pytest-benchmark that shows the times which our own clock has measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    def play(self, rounds: Iterator[float]) -> None:
        self.now += next(rounds)


PLAYER = Player()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--bench-small", action="store_true", help="tiny shapes: tries the benchmarks")
    group.addoption("--bench-out", type=Path, help="folder for a JSON and a table of the results")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    # The project's options are for its tests: two processes, benchmarks off.
    if all(HERE in (Path(arg.partition("::")[0]).resolve() / "x").parents for arg in config.args):
        config.option.benchmark_disable = False
        config.option.numprocesses = 0


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


def pytest_report_header(config: pytest.Config) -> str:
    return what_runs(present_device())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.benchmark(timer=PLAYER.read))
            item.add_marker(pytest.mark.timeout(1200))  # whole models are built and compiled


@pytest.fixture(scope="session")
def setting(request: pytest.FixtureRequest) -> Setting:
    device = present_device()
    small = request.config.getoption("--bench-small")
    return small_setting(device) if small else setting_for(device)


@pytest.fixture
def hold(benchmark: Any, setting: Setting, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Measure a case, and hand its times to pytest-benchmark."""

    def run(case: Case) -> None:
        if not case.runs_on(setting.device):
            pytest.skip(
                f"this row is measured on {case.device}, the device is {setting.device.type}"
            )
        if benchmark.disabled:
            pytest.skip("benchmarks are switched off; run `pytest bench/` alone, without -n")
        row = measure(case, setting)
        setting.release()
        request.config.stash[ROWS].append(row)
        benchmark.group = case.group
        machine = describe(setting.device).as_dict()
        benchmark.extra_info.update(row.as_dict(), machine=machine)
        rounds = row.speeds[row.ours].rounds
        benchmark.pedantic(PLAYER.play, args=(iter(rounds),), rounds=len(rounds))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("times, ratios to peers")
    for row in rows:
        terminalreporter.write_line(results.line(row))


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder, rows = session.config.getoption("--bench-out"), session.config.stash[ROWS]
    if folder is not None and rows:
        small = session.config.getoption("--bench-small")
        device = present_device()
        results.write(describe(device, note_for(device, small)), rows, {}, folder=folder)
