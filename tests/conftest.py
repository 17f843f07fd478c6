"""Options and settings of all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Each worker compiles by itself: a pool of compilers for each would share the same few cores, and
# start by importing torch once more. Read when torch is first imported.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--aot",
        choices=("quick", "ci", "all"),
        default="quick",
        help="how many kernel configurations to compile: one for each family and target (quick), "
        "those and a sample that changes daily (ci), or every one (all)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The interpreted suite takes longest; begun last, it would run while other workers are idle.
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_interpreted_kernels.py"))


@pytest.fixture(autouse=True)
def fusion_is_this_tests_own() -> Iterator[None]:
    """Loading a checkpoint lets Inductor fuse in this process: not beyond the test that loads."""
    yield
    if "mokernels.compile.hook" in sys.modules:
        sys.modules["mokernels.compile.hook"].disable()
