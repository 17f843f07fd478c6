"""``mokernels run``: as Python would run it, and what it loads may be a ModelOpt checkpoint."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mokernels.cli import app
from tests.demo.tiny import byte_tokenizer, talkative_model
from tests.support.models import export

runner = CliRunner()
SCRIPT = """
import json, sys
assert "mokernels" in sys.modules
import helper
print(json.dumps([__name__, sys.argv, helper.WORD, len(sys.path[0]) > 0]))
"""
PIPELINE = """
import sys
from transformers import pipeline
from mokernels.layers import QuantizedLinear
made = pipeline("text-generation", model=sys.argv[1])
assert any(isinstance(module, QuantizedLinear) for module in made.model.modules())
print(len(made("Hello", max_new_tokens=4, do_sample=False)[0]["generated_text"]))
"""
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: "{{target}}"
metric_list: [{metric: perplexity}]
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working folder, with a script, a package and a module beside them."""
    (tmp_path / "sub" / "package").mkdir(parents=True)
    (tmp_path / "helper.py").write_text("WORD = 'beside'")
    (tmp_path / "sub" / "helper.py").write_text("WORD = 'in sub'")
    (tmp_path / "sub" / "script.py").write_text(SCRIPT)
    (tmp_path / "module.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    for name in ("argv", "path"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))
    yield tmp_path
    for name in ("helper", "module"):
        sys.modules.pop(name, None)


def run(*arguments: object, code: int = 0):
    result = runner.invoke(app, ["run", *map(str, arguments)])
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    return result


@pytest.mark.usefixtures("place")
def test_a_script_sees_its_own_arguments_and_folder():
    words = ["sub/script.py", "-m", "x", "--help", "--debug", "--", "-c"]
    assert json.loads(run(*words).stdout) == ["__main__", words, "in sub", True]


def test_a_module_sees_its_file_and_the_working_folder(place):
    found = json.loads(run("-m", "module", "--model", "hf", "--help").stdout)
    argv = [str(place / "module.py"), "--model", "hf", "--help"]
    assert found == ["__main__", argv, "beside", True]


@pytest.mark.parametrize(
    ("line", "code"),
    [("import sys; sys.exit(7)", 7), ("raise SystemExit", 0), ("raise KeyboardInterrupt", 130)],
)
def test_exit_codes_are_kept(place, line, code):
    (place / "end.py").write_text(line)
    run("end.py", code=code)


def test_an_exception_shows_the_scripts_own_frames(place):
    (place / "fail.py").write_text(
        "def inner():\n    raise LookupError('what is missing')\ninner()"
    )
    error = run("fail.py", code=1).stderr
    assert error.startswith("Traceback (most recent call last):\n")
    assert error.rstrip().endswith("LookupError: what is missing")
    assert error.count("File ") == 2
    assert "runpy" not in error


@pytest.mark.usefixtures("place")
def test_wrong_use():
    assert "There is nothing to run" in run(code=2).stderr
    assert "There is nothing to run" in run("-m", code=2).stderr
    error = run("lm_eval", code=2).stderr
    assert "The script 'lm_eval' does not exist" in error
    assert "mokernels run -m lm_eval" in error
    assert "No module named no_such_module" in run("-m", "no_such_module", code=1).stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    export(talkative_model(), path, "NVFP4")
    byte_tokenizer().save_pretrained(path)
    return path


def test_a_script_that_knows_nothing_of_mokernels_loads_a_checkpoint(place, folder):
    (place / "pipe.py").write_text(PIPELINE)
    done = subprocess.run(
        [sys.executable, "-m", "mokernels", "run", "pipe.py", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > len("Hello")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_runs_a_checkpoint(place, folder):
    rows = [{"text": "Hello", "target": " you"}, {"text": "a", "target": "b"}]
    (place / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (place / "tasks").mkdir()
    (place / "tasks" / "tiny.yaml").write_text(TASK % (place / "rows.json"))
    words = ["-m", "lm_eval", "--model", "hf", "--tasks", "tiny", "--include_path", "tasks"]
    words += ["--model_args", f"pretrained={folder},dtype=auto", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "mokernels", "run", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout
