"""The script: in time, in order, and nothing lost."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import run
from bench.support.catalog import small_setting
from bench.support.contest import Case, Setting
from bench.support.machine import describe
from tests.bench.test_contest import case

CPU = torch.device("cpu")


@pytest.fixture
def setting() -> Setting:
    return small_setting(CPU)


def started(folder: Path | None, seconds: float = 60.0) -> run.Run:
    return run.Run(describe(CPU), time.monotonic() + seconds, folder)


def named(name: str, value: float = 1.0) -> Case:
    made = case(value)
    return Case(name, "group", 1, made.build, {}, device="any")


def test_a_wrong_row_does_not_end_the_run(tmp_path: Path, setting: Setting) -> None:
    found = started(tmp_path)
    run.run_all(found, [named("a"), named("b", 2.0), named("c")], setting)
    assert [row.case for row in found.rows] == ["a", "c"]
    assert found.failures["b"].startswith("CheckFailedError: b: ours is off by")
    (file,) = tmp_path.glob("*.json")
    assert [row["case"] for row in json.loads(file.read_text())["rows"]] == ["a", "c"]


def test_what_there_is_no_time_for_is_named(setting: Setting) -> None:
    found = started(None, seconds=0.0)
    run.run_all(found, [named("a")], setting)
    assert (found.rows, found.failures) == ([], {"a": "no time was left"})


def test_models_are_kept_within_a_group(setting: Setting) -> None:
    assert setting.keep("model", lambda: 1) == setting.keep("model", lambda: 2) == 1
    setting.release(kept=False)
    assert setting.kept == {"model": 1}
    setting.release()
    assert setting.kept == {}


def test_rows_that_are_done_are_left_out(tmp_path: Path) -> None:
    done = tmp_path / "done.json"
    done.write_text(json.dumps({"rows": [{"case": "eager call of fp8_linear"}]}))
    options = run.parser().parse_args(["--group", "host", "--only", "fp8", "--done", str(done)])
    names = [case.name for case in run.choose(options, CPU)]
    assert "eager call of fp8_per_token_linear" in names
    assert "eager call of fp8_linear" not in names
    assert "eager call of nvfp4_linear" not in names


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--small", "--group", "host", "--only", "fp8_linear", "--minutes", "3"]
    assert run.main([*small, "--out", str(tmp_path), "--part=-x"]) == 0
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md", ".png"]
    assert "TINY SHAPES" in next(tmp_path.glob("*-x.md")).read_text()
    shown = capsys.readouterr().out
    assert "eager call of fp8_linear" in shown
    assert str(tmp_path) not in shown


def test_without_matplotlib_nothing_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    small = ["--small", "--group", "plan", "--only", "fp8_linear M=1", "--minutes", "3"]
    assert run.main([*small, "--out", str(tmp_path)]) == 0
    assert "no roofline was drawn" in capsys.readouterr().out
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".json", ".md"]
