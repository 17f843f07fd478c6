"""Real ModelOpt exports through transformers, against ModelOpt's own numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mokernels
from mokernels.layers import QuantizedLinear

GOLDEN = Path(__file__).parents[1] / "data" / "checkpoints"
# As in tests/numerics/test_oracles.py: the FP8 exports encode slightly other weights than
# ModelOpt's fake quantization used, NVFP4 and MXFP8 the same ones.
BUDGET = {"nvfp4": 1e-6, "mxfp8": 1e-6, "fp8_pc_pt": 6e-3, "fp8_pb_wo": 8e-3, "fp8": 4e-2}
EXACT = ("nvfp4", "mxfp8")


def relative(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=sorted(BUDGET))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def oracle(name):
    return load_file(GOLDEN / name / "oracle.safetensors")


@pytest.fixture(scope="module")
def model(name):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)


def test_every_layer_gives_modelopts_output(name, model, oracle):
    layers = [key[4:-4] for key in oracle if key.endswith(".y32")]
    assert len(layers) == 7
    for layer in layers:
        module = model.get_submodule(layer)
        assert isinstance(module, QuantizedLinear)
        y = module(oracle[f"lin.{layer}.x"].float())
        assert relative(y, oracle[f"lin.{layer}.y32"]) <= BUDGET[name], layer


def test_logits(name, model, oracle):
    with torch.no_grad():
        logits = model(oracle["input_ids"]).logits
    expected = oracle["logits_post_fp32"]
    # A random tiny model is chaotic: one FP8 code that rounds differently moves its logits by
    # percents. So only the formats whose exports are exact are compared tightly.
    assert relative(logits, expected) <= (1e-6 if name in EXACT else 0.2)


def test_the_loader_of_mokernels_gives_the_same(name, model, oracle):
    other = mokernels.from_pretrained(GOLDEN / name, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(other(oracle["input_ids"]).logits, model(oracle["input_ids"]).logits)


def test_load_into_a_plain_module_gives_the_same(name, model, oracle):
    with torch.device("meta"):
        empty = type(model)(model.config)
    rotary = empty.model.rotary_emb
    rotary.to_empty(device="cpu")
    rotary.inv_freq.copy_(model.model.rotary_emb.inv_freq)
    mokernels.load_into(empty, GOLDEN / name)
    with torch.no_grad():
        logits = empty.eval()(oracle["input_ids"]).logits
    assert torch.equal(logits.float(), model.to(torch.float32)(oracle["input_ids"]).logits)


def test_saving_gives_the_checkpoints_bytes_back(name, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    loaded.save_pretrained(tmp_path)
    before = load_file(GOLDEN / name / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        assert after[key].shape == value.shape, key
        assert torch.equal(after[key].view(torch.uint8) if value.dim() else after[key],
                           value.view(torch.uint8) if value.dim() else value), key  # fmt: skip
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_generate_runs(model):
    ids = torch.tensor([[1, 5, 9]])
    out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 7)


def test_explain_names_every_layer(name, model):
    explanation = mokernels.explain(model)
    assert len(explanation.layers) == 14
    assert explanation.unquantized == ("lm_head",)
    assert {row.kernel for row in explanation.layers} == {"reference"}
    text = str(explanation)
    assert "model.layers.1.mlp.down_proj" in text
    assert "1 not quantized: lm_head" in text
