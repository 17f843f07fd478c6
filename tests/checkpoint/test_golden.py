"""ModelOpt's own exports: audited without a finding, and reproduced byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mokernels.checkpoint import check, open_checkpoint, read_quantization, write_checkpoint
from mokernels.formats import FORMATS

GOLDEN = Path(__file__).parents[1] / "data" / "checkpoints"
FORMAT_OF = {
    "fp8": "FP8",
    "fp8_pb_wo": "FP8_PB_WO",
    "fp8_pc_pt": "FP8_PER_CHANNEL_PER_TOKEN",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
}


@pytest.fixture(params=FORMAT_OF)
def golden(request: pytest.FixtureRequest) -> tuple[Path, str]:
    return GOLDEN / request.param, FORMAT_OF[request.param]


def test_export_passes_without_a_finding(golden: tuple[Path, str]) -> None:
    folder, name = golden
    report = check(folder)
    assert report.findings == ()
    assert report.ok
    assert report.counts == {name: 14}
    assert report.files == ("model.safetensors",)
    assert report.plan.kv_scales == {}
    assert {layer.activation for layer in report.plan.layers} == {FORMATS[name].activation}
    assert {"lm_head.weight", "model.embed_tokens.weight"} < set(report.plan.plain)


def test_layers_have_the_sizes_of_the_model(golden: tuple[Path, str]) -> None:
    folder, _ = golden
    plan = check(folder, values="none").plan
    sizes = {layer.name: (layer.n, layer.k) for layer in plan.layers}
    assert sizes["model.layers.0.self_attn.k_proj"] == (64, 256)
    assert sizes["model.layers.1.mlp.down_proj"] == (256, 512)


def test_config_is_read(golden: tuple[Path, str]) -> None:
    folder, name = golden
    config = read_quantization(folder)
    assert config.format is FORMATS[name]
    assert config.exclude == ("lm_head", "model.embed_tokens")
    assert config.kv_cache is None
    assert config.producer == "0.47.0"
    assert config.files == ("hf_quant_config.json", "config.json")
    assert config.group_size == (FORMATS[name].group_size or None)
    assert config.findings == ()


def test_writer_gives_the_same_bytes(golden: tuple[Path, str], tmp_path: Path) -> None:
    folder, name = golden
    with open_checkpoint(folder) as checkpoint:
        tensors = {key: checkpoint.tensor(key) for key in checkpoint.tensors}
    config = json.loads((folder / "config.json").read_text())
    exclude = config["quantization_config"]["ignore"]
    written = write_checkpoint(tmp_path / "out", tensors, config, FORMATS[name], exclude=exclude)
    for file in ("config.json", "hf_quant_config.json", "model.safetensors"):
        assert (written / file).read_bytes() == (folder / file).read_bytes(), file


def test_two_safetensors_files_without_a_standard_name_are_not_guessed(tmp_path: Path) -> None:
    # The folders hold oracle.safetensors too; it is not taken for weights because a file of the
    # standard name is there.
    with open_checkpoint(GOLDEN / "fp8") as checkpoint:
        assert checkpoint.files == ("model.safetensors",)
        assert "input_ids" not in checkpoint.tensors
