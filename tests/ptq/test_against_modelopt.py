"""The real ModelOpt beside us: same model, same data, same bytes in every file.

It runs where nvidia-modelopt is installed (extra ``modelopt``); the digests of
``tests/data/modelopt_exports.json`` hold its results for machines without.
"""

import pytest

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed (extra: modelopt)")

import copy
import json

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.utils.core_utils import update_quant_cfg_with_kv_cache_quant
from transformers import AutoModelForImageTextToText

import mokernels
from tests.ptq.golden import (
    ARCHITECTURES,
    MIXED_CASES,
    PRESETS,
    batches,
    known_model,
    modelopt_export,
)
from tests.support import vision

pytestmark = pytest.mark.slow
FILES = ("model.safetensors", "config.json", "hf_quant_config.json", "generation_config.json")


def preset(format, cache):
    config = copy.deepcopy(getattr(mtq, PRESETS[format]))
    if cache is None:
        return config
    rules = copy.deepcopy(getattr(mtq, f"{cache}_KV_CFG")["quant_cfg"])
    return update_quant_cfg_with_kv_cache_quant(config, rules)


def assert_same_files(folder, names):
    for name in names:
        theirs, ours = (folder / side / name for side in ("theirs", "ours"))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.parametrize("cache", [None, "FP8", "NVFP4"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("format", PRESETS)
def test_every_file_is_the_same(format, architecture, tied, cache, tmp_path):
    config = preset(format, cache)
    modelopt_export(known_model(architecture, tied=tied), config, tmp_path / "theirs")
    model = known_model(architecture, tied=tied)
    mokernels.quantize(model, config, batches(), progress=False)
    mokernels.export(model, tmp_path / "ours")
    assert_same_files(tmp_path, FILES)


@pytest.mark.parametrize(("architecture", "format"), MIXED_CASES)
def test_every_file_of_a_mixture_is_the_same(architecture, format, tmp_path):
    config = preset(format, None)
    modelopt_export(known_model(architecture), config, tmp_path / "theirs")
    model = known_model(architecture)
    mokernels.quantize(model, config, batches(), unseen="max", progress=False)
    mokernels.export(model, tmp_path / "ours")
    assert_same_files(tmp_path, FILES)
    loaded = mokernels.from_pretrained(tmp_path / "theirs")
    ids = batches()[0]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("architecture", ["Qwen3Moe", "Mixtral"])
def test_every_file_of_a_mixture_of_formats_is_the_same(architecture, tmp_path):
    config = preset("NVFP4", None)
    rules = config["quant_cfg"]
    after = [rule["quantizer_name"] for rule in rules].index("*input_quantizer") + 1
    for kind in ("weight", "input"):
        fp8 = {"num_bits": (4, 3), "axis": None}
        rules.insert(after, {"quantizer_name": f"*self_attn*{kind}_quantizer", "cfg": fp8})
    modelopt_export(known_model(architecture), config, tmp_path / "theirs")
    model = known_model(architecture)
    mokernels.quantize(model, config, batches(), unseen="max", progress=False)
    mokernels.export(model, tmp_path / "ours")
    assert_same_files(tmp_path, FILES)
    listed = json.loads((tmp_path / "ours" / "hf_quant_config.json").read_text())["quantization"]
    assert any(name.endswith(".experts") for name in listed["quantized_layers"])


@pytest.mark.parametrize("format", ["FP8", "NVFP4"])
@pytest.mark.parametrize("architecture", vision.MODELS)
def test_every_file_of_a_vision_model_is_the_same(architecture, format, tmp_path):
    vision.known_vision_model(architecture).save_pretrained(tmp_path / "plain")

    def load():
        return AutoModelForImageTextToText.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)

    theirs, config = load(), preset(format, None)
    export_hf_checkpoint(mtq.quantize(theirs, config, vision.see), export_dir=tmp_path / "theirs")
    ours = load()
    mokernels.quantize(ours, preset(format, None), vision.see, unseen="max", progress=False)
    mokernels.export(ours, tmp_path / "ours")
    assert_same_files(tmp_path, FILES[:3])


def test_names_in_memory_are_read_too(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    theirs = known_model("Mixtral", **sizes)
    modelopt_export(theirs, preset("FP8_PB_WO", None), tmp_path / "theirs")
    model = known_model("Mixtral", **sizes)
    mokernels.quantize(model, "FP8_PB_WO", progress=False)
    loaded = mokernels.from_pretrained(tmp_path / "theirs")
    assert hasattr(loaded.model.layers[0].mlp.experts[0], "gate_proj")
    ids = batches()[0]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_modelopts_export_loads(tmp_path):
    modelopt_export(known_model("Llama"), mtq.NVFP4_DEFAULT_CFG, tmp_path / "theirs")
    assert mokernels.check(tmp_path / "theirs").ok
    assert json.loads((tmp_path / "theirs" / "hf_quant_config.json").read_text())
    mokernels.from_pretrained(tmp_path / "theirs")(batches()[0])
