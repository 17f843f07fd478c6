"""A model beside its quantization: every number against a direct computation."""

from __future__ import annotations

import json
import math
import shutil
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import mokernels
from mokernels.checkpoint import Checkpoint
from mokernels.cli import app
from mokernels.errors import ArgumentError, CheckpointError, MissingDependencyError
from mokernels.evaluate import plot
from mokernels.evaluate.weights import compare_weights
from tests.demo.tiny import SIZES, byte_tokenizer, talkative_model
from tests.support.checkpoints import edit_tensors
from tests.support.models import export, tiny_model

TEXT = "One text that both models are to predict, a few windows long. " * 3
OPTIONS = {"text": TEXT, "window": 32, "windows": 3, "batch": 2, "device": "cpu"}
runner = CliRunner()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Folders a (plain), b (NVFP4) and c (FP8 per channel) of one model."""
    root = tmp_path_factory.mktemp("models")
    model = talkative_model()
    model.save_pretrained(root / "a")
    export(model, root / "b", "NVFP4")
    export(model, root / "c", "FP8_PER_CHANNEL_PER_TOKEN", shards=2)
    byte_tokenizer().save_pretrained(root / "a")
    byte_tokenizer().save_pretrained(root / "c")
    return root


def test_weights_layer_by_layer(place):
    found = compare_weights(place / "a", place / "b")
    model, quantized = talkative_model(), mokernels.from_pretrained(place / "b")
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del linear["lm_head"]
    assert {layer.name for layer in found.layers} == linear.keys()
    for layer in found.layers:
        exact = linear[layer.name].weight.detach().double()
        noise = quantized.get_submodule(layer.name).dequantized_weight().double() - exact
        wanted = 10 * math.log10(float(exact.square().sum() / noise.square().sum()))
        assert layer.sqnr == pytest.approx(wanted, abs=1e-4)
        assert layer.formats == ("bfloat16", "NVFP4")
        assert layer.shape == tuple(exact.shape)
    assert found.differing == ()
    assert found.others == len(model.state_dict()) - len(linear)


def test_an_8_bit_format_is_closer_than_a_4_bit_one(place):
    low, high = (compare_weights(place / "a", place / name).layers for name in "bc")
    for four, eight in zip(low, high, strict=True):
        assert four.sqnr + 8 < eight.sqnr
    both = compare_weights(place / "b", place / "c").layers[0]
    assert both.formats == ("NVFP4", "FP8_PER_CHANNEL_PER_TOKEN")
    assert both.sqnr < low[0].sqnr + 1


def test_a_checkpoint_is_equal_to_itself(place):
    found = mokernels.compare(place / "c", place / "c", **OPTIONS)
    assert all(layer.sqnr == math.inf for layer in found.weights.layers)
    assert (found.predictions.kl, found.predictions.agreement) == (0.0, 1.0)
    assert found.predictions.ratio == 1.0
    assert found.to_dict()["weights"]["layers"][0]["sqnr"] is None


def test_predictions_against_a_direct_computation(place):
    found = mokernels.compare(place / "a", place / "b", weights=False, **OPTIONS)
    assert found.weights is None
    tokens = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])[: 3 * 32].reshape(3, 32)
    models = [
        talkative_model().float(),
        mokernels.from_pretrained(place / "b", dtype=torch.float32),
    ]
    with torch.inference_mode():
        logits = [model(input_ids=tokens).logits[:, :-1].double() for model in models]
    losses = [cross_entropy(row.transpose(1, 2), tokens[:, 1:]) for row in logits]
    p, q = (row.log_softmax(-1) for row in logits)
    predictions = found.predictions
    assert predictions.tokens == 3 * 31
    for perplexity, loss in zip(predictions.perplexities, losses, strict=True):
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert predictions.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert predictions.kl > 1e-4
    wanted = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert predictions.agreement == pytest.approx(float(wanted))


def test_the_text_that_comes_with_python_is_the_default(place):
    options = {**OPTIONS, "text": None}
    assert mokernels.compare(place / "a", place / "c", **options).predictions.tokens == 3 * 31


def test_one_layer_is_in_memory_at_a_time(place, monkeypatch):
    alive, most, read = [], 0, Checkpoint.tensor

    def count(self, name):
        nonlocal most
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", count)
    compare_weights(place / "a", place / "b")
    assert len(alive) >= 14 * 4
    assert most <= 4  # the codes and two scales of a layer, and the plain weight


def test_other_tensors_that_differ_are_named(place, tmp_path):
    shutil.copytree(place / "b", tmp_path / "b")

    def change(tensors):
        tensors["model.norm.weight"][3] += 0.5
        tensors["lm_head.weight"] = tensors["lm_head.weight"].float()  # the same values

    edit_tensors(tmp_path / "b", change)
    found = compare_weights(place / "b", tmp_path / "b")
    assert found.differing == ("model.norm.weight",)


def test_an_output_layer_that_one_side_ties(tmp_path):
    model = tiny_model(tied=True, **SIZES)
    model.save_pretrained(tmp_path / "a")
    export(model, tmp_path / "b", "FP8_PB_WO", exclude=())
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    layers = compare_weights(tmp_path / "a", tmp_path / "b").layers
    (output,) = [layer for layer in layers if layer.name == "lm_head"]
    assert 20 < output.sqnr < math.inf
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    assert compare_weights(tmp_path / "a", tmp_path / "c").differing == ()


def refused(a: Path, b: Path, **options) -> str:
    with pytest.raises(ArgumentError) as error:
        mokernels.compare(a, b, **{**OPTIONS, **options})
    return str(error.value)


def test_models_that_cannot_be_compared(place, tmp_path):
    tiny_model("Qwen2", **SIZES).save_pretrained(tmp_path / "qwen")
    text = refused(place / "a", tmp_path / "qwen")
    assert "LlamaForCausalLM (llama) and Qwen2ForCausalLM (qwen2)" in text
    talkative_model().save_pretrained(tmp_path / "wide")
    edit_tensors(tmp_path / "wide", lambda tensors: tensors.pop("model.norm.weight"))
    assert "only one of them holds 'model.norm.weight'" in refused(place / "b", tmp_path / "wide")
    export(tiny_model(**{**SIZES, "intermediate_size": 256}), tmp_path / "large", "NVFP4")
    assert "is 128 x 192 and 128 x 256" in refused(place / "b", tmp_path / "large")
    tiny_model(**{**SIZES, "vocab_size": 288}).save_pretrained(tmp_path / "words")
    text = refused(place / "a", tmp_path / "words")
    assert "the tensor 'lm_head.weight' is [320, 128] and [288, 128]" in text
    text = refused(place / "a", tmp_path / "words", weights=False)
    assert "The vocabularies differ: 320 and 288 logits" in text


def test_tokenizers_that_differ_or_are_missing(place, tmp_path):
    other = shutil.copytree(place / "c", tmp_path / "c")
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"e":', '"@@":').replace('"f":', '"e":', 1))
    assert "make different tokens of the text" in refused(place / "a", other, weights=False)
    bare = shutil.copytree(place / "b", tmp_path / "b")
    assert "holds no tokenizer" in refused(place / "b", bare, weights=False)


def test_numbers_and_folders_that_cannot_be(place, tmp_path):
    assert refused(place / "a", place / "b", window=1) == "window is 1, wanted at least 2."
    assert refused(place / "a", place / "b", windows=0) == "windows is 0, wanted at least 1."
    assert "Perplexity of 1 tokens" in refused(place / "a", place / "b", weights=False, text="x")
    with pytest.raises(CheckpointError, match=r"\[folder-missing\]"):
        mokernels.compare(place / "a", tmp_path / "nothing")


def run(*arguments: object, code: int = 0):
    result = runner.invoke(app, [str(word) for word in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    assert "Traceback" not in result.output
    return result


def test_the_command_prints_tables_and_draws(place, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    words = ("compare", place / "a", place / "b", "--text", tmp_path / "text", "--device", "cpu")
    words = (*words, "--window", 32, "--windows", 3)
    output = run(*words, "--plot", tmp_path / "plot.png").stdout
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for part in ("predictions of 93 tokens", "perplexity", "q_proj", "the 10 layers with the low"):
        assert part in output
    assert "The other 7 tensors are equal." in output
    assert "every layer" in run(*words, "--layers", "--no-predictions").stdout
    found = json.loads(run(*words, "--json").stdout)
    assert found["predictions"]["tokens"] == 93
    assert len(found["weights"]["layers"]) == 14


def test_plots_that_cannot_be(place, tmp_path, monkeypatch):
    found = mokernels.compare(place / "a", place / "b", predictions=False)
    with pytest.raises(ArgumentError, match=r"The plot's file is 'x.txt', wanted a suffix of"):
        plot.plot(found, tmp_path / "x.txt")
    same = mokernels.compare(place / "a", place / "a", predictions=False)
    with pytest.raises(ArgumentError, match="There is nothing to plot"):
        plot.plot(same, tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(MissingDependencyError, match=r'pip install "mokernels\[plot\]"'):
        plot.plot(found, tmp_path / "x.png")
    words = ("compare", place / "a", place / "b", "--plot", tmp_path / "x.png")
    assert "needs the package matplotlib" in run(*words, code=1).stderr


def test_curves_by_kind_and_depth(place):
    layers = list(compare_weights(place / "a", place / "b").layers)
    found = plot.curves(layers)
    assert {kind: [place for place, _ in points] for kind, points in found.items()} == {
        f"{name}_proj": [0, 1] for name in ("q", "k", "v", "o", "gate", "up", "down")
    }


def test_the_command_dequantizes(place, tmp_path):
    output = run("dequantize", place / "b", tmp_path / "plain").stdout
    assert output.startswith("14 layers in bfloat16, ")
    assert mokernels.check(tmp_path / "plain").plan.layers == ()
    assert "[folder-occupied]" in run("dequantize", place / "b", tmp_path / "plain", code=1).stderr
    assert "[not-quantized]" in run("dequantize", place / "a", tmp_path / "x", code=1).stderr
    words = ("dequantize", place / "b", tmp_path / "x", "--dtype", "int8")
    assert "dtype is 'int8', wanted one of bfloat16" in run(*words, code=2).stderr
    found = compare_weights(place / "b", tmp_path / "plain").layers
    # Rounding to bf16, 8 bits of fraction, is all that differs.
    assert all(layer.sqnr > 45 for layer in found)
