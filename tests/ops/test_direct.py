"""Launches without Triton's search: the same function, grid and arguments as with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mokernels.errors import ArgumentError
from mokernels.settings import remembers_launches
from tests.support.stub_driver import why_not

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    if why_not():
        pytest.skip(why_not())
    folder = tmp_path_factory.mktemp("stub")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")  # Triton links it with the stub
    command = [sys.executable, "-m", "tests.support.direct_launches", str(folder)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def test_libcuda_is_given_the_same(found):
    assert len(found["compared"]) >= 14
    for name, (searched, first, again) in found["compared"].items():
        assert any(searched["values"]), name
        for launch in (first, again):
            assert {**launch, "long": 0} == {**searched, "long": 0}, name


def test_what_was_launched_before_is_not_searched_again(found):
    for name, (_, first, again) in found["compared"].items():
        # Operators may share a kernel and its arguments' kinds: the first may have been before.
        assert first["long"] <= 1, name
        assert again["long"] == 0, name


@pytest.mark.parametrize(
    ("what", "long"),
    [
        ("again", 0),
        ("shifted", 1),
        ("other warps", 1),
        ("watched", 1),
        ("hooked", 1),
        ("told not to", 1),
        ("no longer watched", 0),
    ],
)
def test_what_is_different_goes_the_long_way(found, what, long):
    assert found["other_ways"][what] == long


def test_replayed_calls_launch_what_planned_ones_do(found):
    assert len(found["replayed"]) >= 16
    for name, (planned, *replays) in found["replayed"].items():
        assert planned["planned"] == 1, name
        # Each has an argument of the operator in front, and the result somewhere.
        function, _, values = planned["launches"][-1]
        assert function, name
        assert "result 0" in values, name
        assert any(str(value).startswith("argument") for value in values), name
        for replay in replays:
            assert replay == {**planned, "planned": 0}, name


def test_registered_operators_are_replayed_without_being_checked(found):
    # And checked again where the environment says that nothing is to be remembered.
    assert found["operators"] == {"fp8_linear": [1, 2, 2, 3], "rms_norm_quantize": [1, 2, 2, 3]}


@pytest.mark.parametrize(("given", "remembers"), [("0", False), ("1", True), ("", True)])
def test_the_environment_says_whether_launches_are_remembered(monkeypatch, given, remembers):
    monkeypatch.setenv("MOKERNELS_REMEMBER_LAUNCHES", given)
    assert remembers_launches() == remembers


def test_what_the_environment_cannot_say(monkeypatch):
    monkeypatch.setenv("MOKERNELS_REMEMBER_LAUNCHES", "no")
    with pytest.raises(ArgumentError) as caught:
        remembers_launches()
    assert str(caught.value) == (
        "The environment variable MOKERNELS_REMEMBER_LAUNCHES is 'no', wanted 1 to remember how a "
        "call was launched, or 0 to plan every call anew. Unset, it is 1."
    )


def test_launches_are_not_remembered_without_end(found):
    assert found["other_ways"]["remembered of too many"] == 1
