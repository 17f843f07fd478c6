"""``mokernels demo`` from the command line, on a tiny model."""

import pytest
from typer.testing import CliRunner

import mokernels
from mokernels.cli import app
from mokernels.demo import flow, hub
from tests.demo.tiny import save_model

runner = CliRunner()


@pytest.fixture
def demo(tmp_path, monkeypatch):
    """Runs the demo on a tiny model with a short text."""
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: pytest.fail("asked the hub"))
    sizes = {"WINDOW": 64, "STRIDE": 64, "WINDOWS": 2, "CALIBRATION_SAMPLES": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(flow, name, value)
    model = save_model(tmp_path / "model")

    def run(*options: str):
        words = ["demo", "--model", str(model), "--max-new-tokens", "4", "--device", "cpu"]
        return runner.invoke(app, [*words, *options], env={"COLUMNS": "200"})

    return run


def test_the_demo_passes_and_keeps_its_checkpoint(demo, tmp_path):
    result = demo("--format", "mxfp8", "--output", str(tmp_path / "kept"))
    assert result.exit_code == 0, result.output
    assert "14 layers quantized to MXFP8" in result.stdout
    assert f"The checkpoint is in {tmp_path / 'kept'}" in result.stdout
    assert "perplexity of the quantized model" in result.stderr
    assert mokernels.check(tmp_path / "kept").ok


def test_a_worse_perplexity_fails_the_demo(demo, monkeypatch):
    monkeypatch.setattr(flow, "RATIO_LIMIT", {1: 0.5, 2: 0.5})
    result = demo()
    assert result.exit_code == 1
    assert "times the original's, wanted at most 0.5." in result.stderr
    assert "Traceback" not in result.output


def test_an_empty_answer_fails_the_demo(demo, monkeypatch):
    monkeypatch.setattr(flow, "answer_tokens", lambda *arguments: [])
    result = demo()
    assert result.exit_code == 1
    assert "The quantized model's answer to the prompt is empty." in result.stderr


def test_an_occupied_output_is_left_alone(demo, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    result = demo("--output", str(tmp_path / "kept"))
    assert result.exit_code == 2
    assert "exists and is not empty; nothing is overwritten" in result.stderr
    assert (tmp_path / "kept" / "mine.txt").read_text() == "mine"


def test_an_unknown_format_is_wrong_use(demo):
    result = demo("--format", "FP5")
    assert result.exit_code == 2
    assert "the format 'FP5', wanted one of FP8," in result.stderr
