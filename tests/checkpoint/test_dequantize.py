"""Back to a plain checkpoint: to the bit, complete, a layer at a time, or not at all."""

from __future__ import annotations

import json
import os
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mokernels
from mokernels.checkpoint import Checkpoint, check, open_checkpoint
from mokernels.checkpoint.dequantize import dequantized_weight
from mokernels.errors import ArgumentError, CheckpointError
from mokernels.layers import QuantizedLinear
from tests.demo.tiny import byte_tokenizer
from tests.support.checkpoints import (
    FORMAT_NAMES,
    TINY,
    edit_json,
    make_checkpoint,
    only_finding,
    plain_tensors,
)
from tests.support.compare import assert_same_bits
from tests.support.models import export, tiny_model


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_are_those_of_the_layers(tmp_path, format, dtype):
    folder = make_checkpoint(tmp_path / "q", format, kv_cache="FP8")
    made = mokernels.dequantize(folder, tmp_path / "plain", dtype=dtype)
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    plain = {f"{layer.name}.weight" for layer in TINY} | {f"{TINY[0].name}.bias"}
    assert tensors.keys() == plain | plain_tensors().keys()
    with open_checkpoint(folder) as checkpoint:
        report = check(folder, values="none")
        for layer in report.plan.layers:
            wanted = dequantized_weight(checkpoint, layer).to(getattr(torch, dtype))
            assert wanted.shape == (layer.n, layer.k)
            assert_same_bits(tensors[f"{layer.name}.weight"], wanted)
        for name in [*plain_tensors(), f"{TINY[0].name}.bias"]:
            assert_same_bits(tensors[name], checkpoint.tensor(name))
    assert (made.path, made.dtype, made.layers) == (tmp_path / "plain", dtype, len(TINY))
    assert made.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert made.dropped == (f"{TINY[1].name}.k_scale", f"{TINY[2].name}.v_scale")
    assert sorted(os.listdir(tmp_path)) == ["plain", "q"]


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_plain_transformers_computes_what_the_quantized_model_does(tmp_path, format):
    export(tiny_model(), tmp_path / "q", format, shards=3)
    mokernels.dequantize(tmp_path / "q", tmp_path / "plain", max_shard_size=50_000)
    assert len(list((tmp_path / "plain").glob("*.safetensors"))) > 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    assert plain.dtype == torch.bfloat16
    ids = torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(0))
    ours = mokernels.from_pretrained(tmp_path / "q", activations="16bit", dtype=torch.float32)
    with torch.inference_mode():
        wanted, found = ours(input_ids=ids).logits, plain.float()(input_ids=ids).logits
    # The weights differ by their rounding to bf16, 2^-9 of each, alone.
    assert torch.cosine_similarity(wanted, found, dim=-1).min() > 0.9999


def test_a_quantized_output_layer_is_not_tied_to_the_embedding(tmp_path):
    model = tiny_model(tied=True)
    export(model, tmp_path / "q", "FP8_PER_CHANNEL_PER_TOKEN", exclude=())
    mokernels.dequantize(tmp_path / "q", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    wanted = load_file(tmp_path / "plain" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(plain.lm_head.weight, wanted)
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)


def test_configuration_and_other_files(tmp_path):
    folder = export(tiny_model(), tmp_path / "q", "NVFP4")
    byte_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "more").mkdir()
    edit_json(folder / "config.json", lambda data: data.update(torch_dtype=data.pop("dtype")))
    out = tmp_path / "deep" / "plain"
    mokernels.dequantize(folder, out, dtype=torch.float16)
    names = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    assert sorted(os.listdir(out)) == [*names, "tokenizer.json", "tokenizer_config.json"]
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    del before["quantization_config"]
    assert after == {**before, "torch_dtype": "float16"}
    assert check(out).plan.layers == ()


def test_one_layer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "q", "NVFP4")
    alive: list[weakref.ref] = []
    most = 0
    read = Checkpoint.tensor

    def count(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", count)
    mokernels.dequantize(folder, tmp_path / "plain")
    assert len(alive) > 15
    assert most <= 3  # the codes and two scales of one layer


def test_progress_counts_tensors(tmp_path):
    seen = []
    folder = make_checkpoint(tmp_path / "q")
    mokernels.dequantize(
        folder, tmp_path / "plain", progress=lambda done, total: seen.append((done, total))
    )
    count = len(load_file(tmp_path / "plain" / "model.safetensors"))
    assert seen == [(done, count) for done in range(1, count + 1)]


def test_an_unquantized_checkpoint_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "q", layers=())
    edit_json(folder / "config.json", lambda data: data.pop("quantization_config"))
    (folder / "hf_quant_config.json").unlink()
    with pytest.raises(CheckpointError) as error:
        mokernels.dequantize(folder, tmp_path / "plain")
    assert only_finding(error.value, "not-quantized").found == "no quantized layer"
    assert not (tmp_path / "plain").exists()


def test_an_occupied_folder_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "q")
    with pytest.raises(CheckpointError, match="the folder to write exists already"):
        mokernels.dequantize(folder, folder)
    assert check(folder).ok
    (tmp_path / "empty").mkdir()
    assert mokernels.dequantize(folder, tmp_path / "empty").layers == len(TINY)


def test_a_broken_checkpoint_leaves_nothing_behind(tmp_path, monkeypatch):
    folder = make_checkpoint(tmp_path / "q")
    with pytest.raises(ArgumentError, match="dtype is 'int8', wanted one of bfloat16, float16"):
        mokernels.dequantize(folder, tmp_path / "plain", dtype="int8")

    def fail(self, name):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Checkpoint, "chunks", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        mokernels.dequantize(folder, tmp_path / "plain")
    assert os.listdir(tmp_path) == ["q"]


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    folder = make_checkpoint(tmp_path / "q")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="a symbolic link leads out of the folder"):
        mokernels.dequantize(folder, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"\[folder-missing\]"):
        mokernels.dequantize(tmp_path / "nothing", tmp_path / "plain")
    assert os.listdir(tmp_path) == []
