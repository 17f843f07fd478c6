"""Models whose layers have different formats: quantized, exported, loaded and saved."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mokernels
from mokernels.errors import ArgumentError
from mokernels.layers import QuantizedLinear
from tests.support.models import tiny_model

GOLDEN = Path(__file__).parents[1] / "data" / "checkpoints" / "mixed"
RULES = {"*": "NVFP4", "*self_attn*": "FP8", "*down_proj": "FP8_PB_WO", "*.0.mlp.up_proj": None}
IDS = torch.arange(1, 17)[None]


def loop(model):
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = mokernels.quantize(tiny_model(), RULES, loop, kv_cache="FP8", progress=False)
    return mokernels.export(model, tmp_path_factory.mktemp("mixed") / "out")


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def formats(model):
    return {n: m.format.name for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def test_each_layer_has_the_format_of_the_last_pattern(folder, model):
    found = formats(model)
    assert found["model.layers.0.self_attn.q_proj"] == "FP8"
    assert found["model.layers.1.mlp.up_proj"] == "NVFP4"
    assert found["model.layers.1.mlp.down_proj"] == "FP8_PB_WO"
    assert not {"model.layers.0.mlp.up_proj", "lm_head"} & found.keys()
    body = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert list(body) == ["quant_algo", "kv_cache_quant_algo", "quantized_layers"]
    assert list(body["quantized_layers"]) == list(found)


def test_saving_gives_the_tensors_and_the_list_back(folder, model, tmp_path):
    model.save_pretrained(tmp_path)
    before, after = (
        load_file(folder / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    assert sum(key.endswith(("k_scale", "v_scale")) for key in after) == 4
    for key, value in before.items():
        assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape), key
        assert after[key].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8))
    sections = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path)]
    assert sections[0]["quantization_config"] == sections[1]["quantization_config"]
    assert mokernels.check(tmp_path).findings == ()


def test_load_into_gives_the_same(folder, model):
    plain = mokernels.load_into(tiny_model(), folder)
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, model(IDS).logits)


def test_projections_are_grouped_within_one_format(model):
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and module.siblings is not None:
            assert len({member.format.name for member in module.siblings.members}) == 1
    assert model.model.layers[0].mlp.gate_proj.siblings is None
    assert len(model.model.layers[1].mlp.gate_proj.siblings.members) == 2


def test_explain_counts_every_format(model):
    text = str(mokernels.explain(model))
    assert "8 layers in FP8 (E4M3, static)" in text
    assert "3 layers in NVFP4 (NVFP4, static global scale)" in text
    assert "2 layers in FP8_PB_WO (not quantized)" in text


def test_block_activations_are_for_the_layers_that_can(folder):
    loaded = mokernels.from_pretrained(folder, activations="fp8_block")
    layer = loaded.model.layers[1]
    assert layer.mlp.down_proj.activation.value == "fp8_block"
    assert layer.self_attn.q_proj.activation.value == "fp8_static"


def test_projections_of_one_input_need_one_format():
    model = tiny_model()
    with pytest.raises(ArgumentError) as caught:
        mokernels.quantize(model, {"*": "NVFP4", "*q_proj": "FP8"}, loop, progress=False)
    text = str(caught.value)
    assert "gives projections of one input several formats: 'model.layers.0.self_attn.q_pro" in text
    assert "wanted one format for q_proj, k_proj, v_proj" in text
    assert "'model.layers.0.self_attn.*', or exclude some." in text
    assert not formats(model)


def test_export_of_modelopt_passes_and_is_saved_unchanged(tmp_path):
    report = mokernels.check(GOLDEN)
    assert report.findings == ()
    assert report.counts == {"FP8": 8, "FP8_PB_WO": 2, "NVFP4": 2}
    AutoModelForCausalLM.from_pretrained(GOLDEN).save_pretrained(tmp_path)
    before, after = (
        load_file(GOLDEN / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8))


def test_writer_gives_the_bytes_of_modelopts_export(tmp_path):
    with mokernels.checkpoint.open_checkpoint(GOLDEN) as checkpoint:
        tensors = {key: checkpoint.tensor(key) for key in checkpoint.tensors}
        listed = checkpoint.config.quantized_layers
    rows = {name: layer.format for name, layer in listed.items()}
    config = json.loads((GOLDEN / "config.json").read_text())
    written = mokernels.checkpoint.write_checkpoint(
        tmp_path / "out", tensors, config, rows, kv_cache="FP8"
    )
    for file in ("config.json", "hf_quant_config.json", "model.safetensors"):
        assert (written / file).read_bytes() == (GOLDEN / file).read_bytes(), file
