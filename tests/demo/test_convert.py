"""Model to checkpoint: the codes, what is left out, which formats."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mokernels
from mokernels.checkpoint import quantize_weight
from mokernels.demo.convert import (
    choose_format,
    excluded_modules,
    formats_without_calibration,
    quantizable_layers,
    write_quantized,
)
from mokernels.errors import ArgumentError, CheckpointError
from tests.demo.tiny import byte_tokenizer, talkative_model
from tests.support.compare import assert_same_bits
from tests.support.models import tiny_model

FREE = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8")


def test_the_formats_that_need_no_data():
    assert tuple(row.name for row in formats_without_calibration()) == FREE
    assert choose_format("fp8_pb_wo").name == "FP8_PB_WO"


def test_a_format_with_calibration_is_refused():
    with pytest.raises(ArgumentError, match=f"NVFP4 needs calibrated .* one of {', '.join(FREE)},"):
        choose_format("nvfp4")


def test_an_unknown_format_is_refused():
    with pytest.raises(ArgumentError, match=f"'INT3' is not known; .* one of {', '.join(FREE)}"):
        choose_format("INT3")


@pytest.mark.parametrize("format", FREE)
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_is_written_as_it_should_be(tmp_path, format, tied):
    model, row = talkative_model(tied=tied), choose_format(format)
    calls = []
    folder = write_quantized(
        model, byte_tokenizer(), tmp_path / "out", row, lambda *done: calls.append(done)
    )
    assert mokernels.check(folder).ok
    stored = load_file(folder / "model.safetensors")
    expected = {}
    for name, value in model.state_dict().items():
        owner = name.removesuffix(".weight")
        if name.endswith("_proj.weight"):
            for leaf, tensor in quantize_weight(row, value).items():
                expected[f"{owner}.{leaf}"] = tensor
        elif not (tied and owner == "lm_head"):
            expected[name] = value
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bits(stored[name], tensor)
    total = len(model.state_dict())
    assert calls == [(done, total) for done in range(1, total + 1)]


def test_the_folder_is_complete(tmp_path):
    model = talkative_model()
    row = choose_format("MXFP8")
    folder = write_quantized(model, byte_tokenizer(), tmp_path / "out", row)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["quant_algo"] == "MXFP8"
    quantization = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert sorted(quantization["exclude_modules"]) == ["lm_head", "model.embed_tokens"]
    names = {path.name for path in folder.iterdir()}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names


def test_layers_that_the_format_does_not_fit_stay_plain(tmp_path):
    model = tiny_model("Llama", intermediate_size=200)  # down_proj: 200 is no multiple of 32
    row = choose_format("MXFP8")
    names = quantizable_layers(model, row)
    assert not any(name.endswith("down_proj") for name in names)
    assert "model.layers.1.mlp.down_proj" in excluded_modules(model, names)
    report = mokernels.check(write_quantized(model, byte_tokenizer(), tmp_path / "out", row))
    assert report.ok
    assert report.counts == {"MXFP8": 2 * 6}


def test_a_model_that_fits_nowhere_is_refused(tmp_path):
    model = talkative_model()
    for name in quantizable_layers(model, choose_format("FP8")):
        model.set_submodule(name, nn.Linear(33, 4, dtype=torch.bfloat16))
    with pytest.raises(ArgumentError, match="LlamaForCausalLM has no linear layer that MXFP8 fits"):
        write_quantized(model, byte_tokenizer(), tmp_path / "out", choose_format("MXFP8"))
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="folder-occupied"):
        write_quantized(talkative_model(), byte_tokenizer(), tmp_path, choose_format("FP8"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
