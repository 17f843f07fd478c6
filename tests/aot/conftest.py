"""Ahead-of-time compilation of kernels for targets that this machine need not have.

A test module lists its cases and gets those that ``--aot`` selects, one by one::

    @pytest.mark.aot_cases(CASES)
    def test_no_spills(case): ...
"""

from __future__ import annotations

import pytest

from tests.support.aot import Case, Compiled, compile_launch, day_of_year, select_cases
from tests.support.interpreter import interpreting

if interpreting():
    raise pytest.UsageError(
        "tests/aot compiles kernels, which a process that interprets them cannot: unset "
        "TRITON_INTERPRET, or name other folders"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "aot_cases(cases): cases that --aot selects from")


def pytest_report_header(config: pytest.Config) -> str:
    level = config.getoption("--aot")
    sample = f", sample of day {day_of_year()}" if level == "ci" else ""
    return f"ahead-of-time compilation: {level}{sample}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("aot_cases")
    if marker is not None:
        level = metafunc.config.getoption("--aot")
        selected = select_cases(marker.args[0], level, day_of_year())
        metafunc.parametrize("case", selected, ids=str)


@pytest.fixture
def compiled(case: Case) -> Compiled:
    """The case's kernel, compiled."""
    return compile_launch(case.plan(), case.target)
