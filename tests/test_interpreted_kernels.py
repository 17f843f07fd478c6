"""Run ``tests/kernels`` under Triton's interpreter, in a process of its own, and report each case.

The interpreter is chosen when triton is first imported, so that one process cannot both interpret
kernels and compile them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.interpreter import interpreting

KERNEL_TESTS = Path(__file__).parent / "kernels"
MINUTES = 40
# What the outer run was told about workers or reports is not for the inner one.
INHERITED = ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")


@dataclass(frozen=True)
class Result:
    """One case of the inner run; ``problem`` and ``skipped`` hold pytest's messages, if any."""

    name: str
    problem: str
    skipped: str


def run_interpreted(folder: Path, report: Path) -> subprocess.CompletedProcess[str]:
    """Run the tests of a folder in an interpreting process that writes a JUnit report."""
    command = [sys.executable, "-m", "pytest", str(folder), "-q", f"--junit-xml={report}"]
    command += ["-p", "no:cacheprovider", "-o", "junit_family=xunit2"]
    command += ["-n", "2"] if find_spec("xdist") else []
    environment = {k: v for k, v in os.environ.items() if k not in INHERITED}
    environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=MINUTES * 60,
    )


def read_results(report: Path) -> list[Result]:
    """The cases of a JUnit report."""
    return [
        Result(
            name=f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}",
            problem="\n".join(_texts(case, "failure") + _texts(case, "error")),
            skipped="\n".join(_texts(case, "skipped")),
        )
        for case in ElementTree.parse(report).iter("testcase")
    ]


def _texts(case: ElementTree.Element, tag: str) -> list[str]:
    return [f"{found.get('message', '')}\n{found.text or ''}".strip() for found in case.iter(tag)]


def report_each(done: subprocess.CompletedProcess[str], report: Path, subtests) -> None:
    """Report every inner case as a subtest, and fail if the inner run was not a whole one."""
    if not report.exists():
        pytest.fail(f"the interpreted tests did not start:\n{done.stdout}", pytrace=False)
    results = read_results(report)
    for result in results:
        with subtests.test(msg=result.name):
            if result.problem:
                pytest.fail(result.problem, pytrace=False)
            if result.skipped:
                pytest.skip(result.skipped)
    if not results:
        pytest.fail(f"no interpreted test was collected:\n{done.stdout}", pytrace=False)
    failed = any(result.problem for result in results)
    if done.returncode not in (0, 1) or (done.returncode == 1) != failed:
        pytest.fail(f"pytest ended with status {done.returncode}:\n{done.stdout}", pytrace=False)


@pytest.mark.timeout(MINUTES * 60 + 60)
@pytest.mark.skipif(interpreting(), reason="this process interprets: run tests/kernels itself")
def test_kernels_under_the_interpreter(subtests, tmp_path):
    report = tmp_path / "report.xml"
    report_each(run_interpreted(KERNEL_TESTS, report), report, subtests)


INNER = """
import pytest, triton

def test_passes():
    assert type(triton.language.max).__name__ == "InterpretedFunction"

def test_fails():
    assert 1 == 2, "one is not two"

@pytest.mark.skip(reason="for a reason")
def test_is_skipped(): ...
"""


class RecordingSubtests:
    """Stands in for pytest's fixture and keeps what each subtest ended with."""

    def __init__(self):
        self.outcomes = {}

    def test(self, msg):
        self.name = msg
        return self

    def __enter__(self):
        self.outcomes[self.name] = "passed"

    def __exit__(self, kind, error, traceback):
        if kind is not None:
            self.outcomes[self.name] = f"{kind.__name__}: {error}"
        return True


def test_each_inner_outcome_is_reported(tmp_path):
    (tmp_path / "test_inner.py").write_text(INNER)
    recorded, report = RecordingSubtests(), tmp_path / "report.xml"
    report_each(run_interpreted(tmp_path, report), report, recorded)
    outcomes = recorded.outcomes
    assert outcomes["test_inner::test_passes"] == "passed"
    assert outcomes["test_inner::test_fails"].startswith("Failed: ")
    assert "one is not two" in outcomes["test_inner::test_fails"]
    assert outcomes["test_inner::test_is_skipped"].startswith("Skipped: for a reason")
    assert len(outcomes) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no interpreted test was collected"),
        ("import nothing_of_this_name", "nothing_of_this_name"),
        ("import os\ndef test_dies(): os._exit(3)", "worker|status|did not start"),
    ],
    ids=["empty", "import error", "crash"],
)
def test_a_run_that_is_not_whole_fails(tmp_path, source, message):
    (tmp_path / "test_inner.py").write_text(source)
    recorded, report = RecordingSubtests(), tmp_path / "report.xml"
    done = run_interpreted(tmp_path, report)
    try:
        report_each(done, report, recorded)
    except pytest.fail.Exception as failure:
        recorded.outcomes["the run"] = f"Failed: {failure}"
    failures = [text for text in recorded.outcomes.values() if text.startswith("Failed")]
    assert failures
    assert re.search(message, "\n".join(failures))
