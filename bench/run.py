"""``python -m bench.run``: measure what there is time for, the most valuable rows first.

Every row is checked for correctness before it is timed, and results are written after each row, so
that a run that is cut off loses nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.support import results
from bench.support.catalog import (
    GROUPS,
    cases,
    note_for,
    one_of_each,
    present_device,
    setting_for,
    small_setting,
    what_runs,
)
from bench.support.contest import Case, Setting, measure
from bench.support.machine import Machine, describe

FIRST_GUESS = {"decode": 90.0, "CPU": 60.0}
"""Seconds that the first case of a group may take, by the begin of the group's name."""


@dataclass
class Run:
    """What was measured so far, and whether there is time for more."""

    machine: Machine
    deadline: float
    folder: Path | None
    part: str = ""
    rows: list[results.Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    took: dict[tuple[str, object], float] = field(default_factory=dict)

    def has_time_for(self, case: Case) -> bool:
        guess = next((s for name, s in FIRST_GUESS.items() if case.group.startswith(name)), 15.0)
        return time.monotonic() + 1.3 * self.took.get(_like(case), guess) < self.deadline

    def measure(self, case: Case, setting: Setting) -> None:
        begin = time.monotonic()
        try:
            self.rows.append(measure(case, setting))
            say(results.line(self.rows[-1]))
            for name, why in self.rows[-1].skipped.items():
                say(f"    without {name}: {why}")
        except Exception as error:  # the next case may be all right
            self.failures[case.name] = f"{type(error).__name__}: {error}"
            say(f"{case.name}: NOT REPORTED: {self.failures[case.name]}")
        seconds = time.monotonic() - begin
        self.took[_like(case)] = max(seconds, 0.7 * self.took.get(_like(case), 0.0))

    def write(self, setting: Setting) -> list[Path]:
        """The files that were written: none without a folder."""
        if self.folder is None or not self.rows:
            return []
        found = (self.machine, self.rows, self.failures, setting.ceilings)
        return list(results.write(*found, folder=self.folder, part=self.part))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a row was wrong or broke."""
    options = parser().parse_args(arguments)
    device = present_device()
    chosen = choose(options, device)
    say(what_runs(device))
    if options.list:
        for case in chosen:
            say(case.name)
        return 0
    setting = small_setting(device) if options.small else setting_for(device)
    note = " ".join(filter(None, [note_for(device, options.small), options.note]))
    deadline = time.monotonic() + 60 * options.minutes
    # Numbers of tiny shapes are only written where somebody asked for them.
    folder = options.out or (None if options.small else results.FOLDER)
    run = Run(describe(device, note), deadline, folder, options.part)
    if not options.small:
        say(f"measured ceilings: {setting.ceilings}")
    run_all(run, chosen, setting)
    files = run.write(setting)
    if options.plot and files and folder is not None:
        files += draw(run, setting, folder)
    for file in files:
        say(f"wrote {file.name}")
    return 1 if any("no time" not in why for why in run.failures.values()) else 0


def draw(run: Run, setting: Setting, folder: Path) -> list[Path]:
    """The roofline's file; without matplotlib none, which is said."""
    try:
        from bench.support.roofline import plot

        return [plot(run.machine, run.rows, setting.ceilings, folder, run.part)]
    except ImportError as error:
        say(f"no roofline was drawn: {error}. Install matplotlib, or pass --no-plot.")
        return []


def run_all(run: Run, chosen: Sequence[Case], setting: Setting) -> None:
    """Measure case after case; what there is no time for is named."""
    for number, case in enumerate(chosen):
        if not run.has_time_for(case):
            run.failures[case.name] = "no time was left"
            continue
        run.measure(case, setting)
        later = chosen[number + 1 : number + 2]
        setting.release(kept=not (later and later[0].group == case.group))
        run.write(setting)


def choose(options: argparse.Namespace, device: torch.device) -> list[Case]:
    """Cases of this device that the options ask for."""
    done = set()
    for file in options.done:
        done |= {row["case"] for row in json.loads(file.read_text())["rows"]}
    wanted = cases(*options.group)
    if options.small:
        wanted = [case for group in options.group or GROUPS for case in one_of_each(group)]
    found = [case for case in wanted if case.runs_on(device)]
    named = [case for case in found if all(text in case.name for text in options.only)]
    return [case for case in named if case.name not in done]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__)
    add = made.add_argument
    add("--minutes", type=float, default=9.0, help="stop in time for this")
    add("--group", action="append", default=[], choices=GROUPS, help="only these")
    add("--only", action="append", default=[], help="names that hold this text")
    add("--done", type=Path, action="append", default=[], help="JSON of rows to leave out")
    add("--out", type=Path, help="folder for the results, bench/results by default")
    add("--part", default="", help="end of the files' names, for one of several runs")
    add("--note", default="", help="a sentence for the results")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw a roofline")
    add(
        "--small",
        action="store_true",
        help="tiny shapes, one case of each kind: tries the benchmarks only",
    )
    add("--list", action="store_true", help="name the cases and measure nothing")
    return made


def _like(case: Case) -> tuple[str, object]:
    """Cases of one kind take about equally long."""
    return case.group, case.facts.get("model")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
