"""``mokernels quantize`` from the command line, on a tiny model."""

import json
import shutil

import pytest
from safetensors.torch import load
from typer.testing import CliRunner

import mokernels
from mokernels.cli import app
from mokernels.cli import quantize as ptq
from mokernels.demo import hub
from tests.demo.tiny import save_model
from tests.support.compare import assert_same_bits

runner = CliRunner()


@pytest.fixture
def quantize(tmp_path, monkeypatch):
    """Runs the command on a tiny model, with a text of its own."""
    monkeypatch.setattr(hub, "hub_reachable", lambda repo: pytest.fail("asked the hub"))
    monkeypatch.setattr(ptq, "HELD_BACK_WINDOWS", 1)
    model, text = save_model(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)

    def run(*options: str, calib: bool = True):
        words = ["quantize", str(model), "-o", str(tmp_path / "out"), "--device", "cpu"]
        given = ["--calib", str(text), "--samples", "4", "--length", "64"] if calib else []
        return runner.invoke(app, [*words, *given, *options], env={"COLUMNS": "300"})

    return run


def test_from_a_model_to_a_checkpoint_and_its_cost(quantize, tmp_path):
    result = quantize("--kv-cache", "fp8", "--exclude", "*.1.mlp.down_proj")
    assert result.exit_code == 0, result.output
    assert "13 layers quantized" in result.stdout
    assert (
        "Not quantized: lm_head, model.embed_tokens, model.layers.1.mlp.down_proj" in result.stdout
    )
    report = mokernels.check(tmp_path / "out")
    assert report.ok
    assert report.plan.config.kv_cache == "FP8"
    written = json.loads((tmp_path / "out" / "mokernels_report.json").read_text())
    found = written["held_back"]
    assert found["tokens"] == 511
    assert 0.9 < found["perplexity"] / found["perplexity_of_the_original"] < 1.1
    assert 0 < found["kl_divergence"] < 0.2
    assert set(found["clipped_share"]) == set(written["layers"])
    assert all(0 <= share < 0.01 for share in found["clipped_share"].values())


def test_formats_without_calibration_need_no_text(quantize, tmp_path):
    result = quantize("--format", "fp8_pb_wo", "--no-compare", calib=False)
    assert result.exit_code == 0, result.output
    assert "held_back" not in json.loads((tmp_path / "out" / "mokernels_report.json").read_text())


def test_a_folder_is_streamed_to_the_same_tensors(quantize, tmp_path):
    assert quantize("--format", "MXFP8", "--stream", calib=False).exit_code == 0
    streamed = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert quantize("--format", "MXFP8", "--no-compare", calib=False).exit_code == 0
    loaded = load(streamed)
    for name, tensor in load((tmp_path / "out" / "model.safetensors").read_bytes()).items():
        assert_same_bits(loaded.pop(name), tensor)
    assert not loaded


@pytest.mark.parametrize(
    ("options", "calib", "message"),
    [
        (("--stream", "--format", "MXFP8"), True, "--stream quantizes weights alone"),
        (("--stream", "--resume", "state", "--kv-cache", "FP8"), False, "--kv-cache and --resume"),
        (("--stream", "--format", "NVFP4"), False, "NVFP4"),
        (("--format", "FP5"), True, "the format 'FP5', wanted one of"),
        (("--format", "FP8"), False, "FP8 needs calibrated scales: give a text"),
        (("--format", "MXFP8", "--kv-cache", "FP8"), False, "A KV cache needs calibrated scales"),
        (("--kv-cache", "INT8"), True, "kv_cache='INT8' is not known"),
        (("--observer", "median"), True, "observer='median' is not known"),
        (("--unseen", "guess"), True, "unseen='guess' is not known"),
    ],
)
def test_wrong_use_is_a_sentence_and_writes_nothing(quantize, tmp_path, options, calib, message):
    result = quantize(*options, "--no-compare", calib=calib)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_a_quantized_model_is_no_input(quantize, tmp_path):
    assert quantize("--format", "MXFP8", "--no-compare", calib=False).exit_code == 0
    out = tmp_path / "out"
    again = runner.invoke(
        app, ["quantize", str(out), "-o", str(tmp_path / "b"), "--format", "MXFP8"]
    )
    assert again.exit_code == 2
    assert "is quantized already" in again.stderr
