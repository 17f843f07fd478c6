"""Rows of results: ratios, JSON, and a table to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.support.machine import Ceilings, Machine
from bench.support.timing import Timing

FOLDER = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Speed:
    """How fast one contender was.

    Attributes:
        us: microseconds of a call, median of the rounds.
        spread: half of the rounds lie between these, in microseconds.
        tflops: 1e12 operations a second; None if it has no product.
        gbps: 1e9 bytes a second of what has to be moved at least; None where that says nothing.
        share: least time that the measured ceilings allow, as a share of the time taken.
        rounds: seconds of a call in every round.
    """

    us: float
    spread: tuple[float, float]
    tflops: float | None
    gbps: float | None
    share: float | None
    rounds: tuple[float, ...]

    @classmethod
    def of(cls, timing: Timing, flops: float, moved: float, share: float | None) -> Speed:
        seconds = timing.median
        low, high = timing.quartiles
        return cls(
            us=seconds * 1e6,
            spread=(low * 1e6, high * 1e6),
            tflops=flops / seconds / 1e12 if flops else None,
            gbps=moved / seconds / 1e9 if moved else None,
            share=share,
            rounds=timing.rounds,
        )

    def as_dict(self) -> dict[str, Any]:
        numbers = {"us": self.us, "tflops": self.tflops, "gbps": self.gbps, "share": self.share}
        short = {key: _short(value) for key, value in numbers.items()}
        return {**short, "spread_us": [_short(edge) for edge in self.spread]}


@dataclass(frozen=True)
class Row:
    """What was measured of one case.

    Attributes:
        case: its name.
        group: its table.
        facts: shape and format.
        ours: name of our contender in ``speeds``.
        speeds: of everybody that ran, by name.
        skipped: why others did not, by name.
        error: of our result, as a share of what the check allows.
        target: least wanted ratio, or None.
        against: the peers it speaks of; all when empty.
    """

    case: str
    group: str
    facts: Mapping[str, Any]
    ours: str
    speeds: Mapping[str, Speed]
    skipped: Mapping[str, str]
    error: float
    target: float | None = None
    against: tuple[str, ...] = ()

    @property
    def ratios(self) -> dict[str, float]:
        """Time of every peer over ours: above 1 we are faster."""
        own = self.speeds[self.ours].us
        return {name: s.us / own for name, s in self.speeds.items() if name != self.ours}

    @property
    def best_peer(self) -> str | None:
        """The fastest of those that the target speaks of."""
        ratios = {n: r for n, r in self.ratios.items() if not self.against or n in self.against}
        return min(ratios, key=ratios.__getitem__) if ratios else None

    @property
    def ratio(self) -> float | None:
        """To the best peer."""
        return None if self.best_peer is None else self.ratios[self.best_peer]

    @property
    def meets_target(self) -> bool | None:
        """None without a target or without a peer."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio >= self.target

    @property
    def tokens_per_second(self) -> float | None:
        """Of ours, where a call makes tokens."""
        tokens = self.facts.get("tokens_per_call")
        return None if tokens is None else tokens / self.speeds[self.ours].us * 1e6

    def as_dict(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "group": self.group,
            **self.facts,
            "ours": self.ours,
            "speeds": {name: speed.as_dict() for name, speed in self.speeds.items()},
            "skipped": dict(self.skipped),
            "error_share": _short(self.error),
            "best_peer": self.best_peer,
            "ratio": _short(self.ratio),
            "tokens_per_second": _short(self.tokens_per_second),
            "target": self.target,
            "meets_target": self.meets_target,
        }


def markdown(
    machine: Machine,
    rows: Sequence[Row],
    failures: Mapping[str, str],
    ceilings: Ceilings | None = None,
) -> str:
    """Everything that was measured, one table for each group."""
    lines = [f"# {machine.device}, {machine.date}", "", _software(machine)]
    if machine.note:
        lines.append(f"{machine.note}")
    if ceilings is not None:
        lines.append(_ceilings(ceilings))
    lines += ["", "`ratio` is the time of the best peer over ours: above 1 mokernels is faster."]
    for group in dict.fromkeys(row.group for row in rows):
        lines += ["", f"## {group}", ""]
        lines += _table([row for row in rows if row.group == group])
    lines += _reasons("Left out", _skipped(rows))
    lines += _reasons("Not reported", [f"{case}: {why}" for case, why in failures.items()])
    return "\n".join(lines) + "\n"


def document(
    machine: Machine,
    rows: Sequence[Row],
    failures: Mapping[str, str],
    ceilings: Ceilings | None = None,
) -> dict[str, Any]:
    """The same for programs."""
    found = None
    if ceilings is not None:
        peaks = {
            f"{name}_tflops": _short(f / 1e12) for name, f in ceilings.flops_per_second.items()
        }
        found = {"read_gbps": _short(ceilings.bytes_per_second / 1e9), **peaks}
    return {
        "machine": machine.as_dict(),
        "ceilings": found,
        "rows": [row.as_dict() for row in rows],
        "not_reported": dict(failures),
    }


def write(
    machine: Machine,
    rows: Sequence[Row],
    failures: Mapping[str, str],
    ceilings: Ceilings | None = None,
    *,
    folder: Path = FOLDER,
    part: str = "",
) -> tuple[Path, Path]:
    """Write ``<device>-<date><part>.json`` and ``.md``; such files are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    data, table = (folder / f"{machine.slug}{part}.{end}" for end in ("json", "md"))
    text = json.dumps(document(machine, rows, failures, ceilings), indent=1)
    data.write_text(text + "\n")
    table.write_text(markdown(machine, rows, failures, ceilings))
    return data, table


def line(row: Row) -> str:
    """One row for somebody who watches the run."""
    others = ", ".join(f"{n} {s.us:.4g}" for n, s in row.speeds.items() if n != row.ours)
    verdict = {True: "met", False: "MISSED", None: ""}[row.meets_target]
    target = "" if row.target is None else f" (target {row.target:g}: {verdict or 'no peer'})"
    ratio = "no peer" if row.ratio is None else f"{row.ratio:.2f}x"
    return f"{row.case}: {_speeds(row.speeds[row.ours])}, {ratio}{target} | {others}"


def _speeds(own: Speed) -> str:
    """``12.3 us, 45.6 TFLOPS, 789 GB/s, 80 % of the ceiling``, as far as they mean something."""
    parts = [f"{own.us:.4g} us"]
    parts += [] if own.tflops is None else [f"{own.tflops:.3g} TFLOPS"]
    parts += [] if own.gbps is None else [f"{own.gbps:.4g} GB/s"]
    parts += [] if own.share is None else [f"{100 * own.share:.0f} % of the ceiling"]
    return ", ".join(parts)


HEAD = (
    *("case", "us", "tokens/s", "TFLOPS", "GB/s", "of ceiling"),
    *("best peer", "its us", "ratio", "target", "all peers: us"),
)


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    return [*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows)]


def _cells(row: Row) -> list[str]:
    own, best = row.speeds[row.ours], row.best_peer
    target = "" if row.target is None else f"{row.target:g}"
    if row.meets_target is not None:
        target += " met" if row.meets_target else " **missed**"
    return [
        row.case,
        _cell(own.us),
        _cell(row.tokens_per_second),
        _cell(own.tflops),
        _cell(own.gbps),
        "" if own.share is None else f"{100 * own.share:.0f} %",
        best or "none ran",
        "" if best is None else _cell(row.speeds[best].us),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        target,
        "; ".join(f"{n} {_cell(s.us)}" for n, s in row.speeds.items() if n != row.ours),
    ]


def _skipped(rows: Iterable[Row]) -> list[str]:
    """Each reason once, with the number of rows it concerns."""
    count: dict[str, int] = {}
    for row in rows:
        for name, why in row.skipped.items():
            count[f"{name}: {why}"] = count.get(f"{name}: {why}", 0) + 1
    return [f"{text} ({times} rows)" for text, times in count.items()]


def _reasons(title: str, texts: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *(f"- {text}" for text in texts)] if texts else []


def _software(machine: Machine) -> str:
    return (
        f"torch {machine.torch}, triton {machine.triton}, transformers {machine.transformers}, "
        f"Python {machine.python}, threads: {machine.threads}."
    )


def _ceilings(ceilings: Ceilings) -> str:
    peaks = ", ".join(f"{n} {f / 1e12:.4g} TFLOPS" for n, f in ceilings.flops_per_second.items())
    return (
        f"Ceilings measured in this run: read {ceilings.bytes_per_second / 1e9:.4g} GB/s, {peaks}."
    )


def _cell(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.4g}")
