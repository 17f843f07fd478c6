"""``mokernels check``: the audit, printed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from mokernels.checkpoint import CheckpointPlan, QuantizationConfig, Report, check
from mokernels.errors import CheckpointError, Finding

_STYLES = {"error": "red", "warning": "yellow"}


def audited(folder: Path, values: str) -> Report:
    """The audit's report; a path that is no folder becomes one with that error.

    Raises:
        ArgumentError: ``values`` is not one of "all", "scales" and "none".
    """
    try:
        return check(folder, values=values)  # type: ignore[arg-type]
    except CheckpointError as error:
        return Report(str(folder), error.findings, CheckpointPlan(QuantizationConfig()))


def print_report(console: Console, report: Report) -> None:
    """Each finding with its rule, then the summary; nothing is cut or read as markup."""
    for finding in (*report.errors, *report.warnings):
        line = Text.assemble(
            (f"{finding.severity} ", _STYLES[finding.severity]),
            (f"[{finding.rule}] ", "bold"),
            str(finding),
        )
        console.print(line, soft_wrap=True)
    verdict_line = Text(f"{report.path}: {verdict(report)}", style=_verdict_style(report))
    console.print(verdict_line, soft_wrap=True)
    # Its own text, less the findings, which are above with colours.
    for content in str(dataclasses.replace(report, findings=())).splitlines()[1:]:
        console.print(Text(content), soft_wrap=True)


def verdict(report: Report) -> str:
    """``"ok"``, or the numbers of errors and warnings."""
    errors, warnings = len(report.errors), len(report.warnings)
    counts = [f"{errors} error{'s' * (errors != 1)}"] if errors else []
    counts += [f"{warnings} warning{'s' * (warnings != 1)}"] if warnings else []
    return ", ".join(["ok" if report.ok else "not ok", *counts])


def _verdict_style(report: Report) -> str:
    return "green" if report.ok else "bold red"


def report_json(report: Report) -> str:
    """The report as one JSON object; its fields are stable."""
    found: dict[str, Any] = {
        "path": report.path,
        "ok": report.ok,
        "errors": [_fields(finding) for finding in report.errors],
        "warnings": [_fields(finding) for finding in report.warnings],
        "layers": dict(report.counts),
        "files": list(report.files),
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "values": report.values,
    }
    return json.dumps(found, indent=2)


def _fields(finding: Finding) -> dict[str, Any]:
    return {**dataclasses.asdict(finding), "message": str(finding)}
