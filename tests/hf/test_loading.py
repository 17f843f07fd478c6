"""Loading, saving and moving models of several architectures through transformers."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import mokernels
from mokernels.errors import ArgumentError, CheckpointError
from mokernels.formats import FORMATS, Activation
from mokernels.layers import QuantizedLinear
from tests.support.models import export, tiny_model

IDS = torch.tensor([[1, 5, 9, 33, 70, 2]])
FORMAT_NAMES = sorted(FORMATS)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits.float()


def quantized_layers(model):
    return [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )  # fmt: skip


def assert_resaves(model, folder, target):
    model.save_pretrained(target)
    before, after = load_file(folder / "model.safetensors"), load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert [k for k in before if not same_bytes(before[k], after[k])] == []


ARCHITECTURES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Phi3", "Gemma", "Phi", "GPTNeoX")


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(tmp_path, architecture, format):
    original = tiny_model(architecture)
    exclude = ("embed_out",) if architecture == "GPTNeoX" else ("lm_head",)
    tied = original.config.tie_word_embeddings
    folder = export(original, tmp_path / "in", format, exclude=exclude)
    model = AutoModelForCausalLM.from_pretrained(folder)
    linear = [n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear)]
    assert quantized_layers(model) == [name for name in linear if name not in exclude]
    assert not any(p.is_meta for p in model.parameters())
    frozen = [p for m in model.modules() if isinstance(m, QuantizedLinear) for p in m.parameters()]
    assert not any(p.requires_grad for p in frozen)
    reference, mine = logits(original), logits(model)
    cosine = torch.cosine_similarity(reference.flatten(), mine.flatten(), 0)
    assert cosine > (0.9 if format == "NVFP4" else 0.99)
    assert tied == model.config.tie_word_embeddings
    assert_resaves(model, folder, tmp_path / "out")


@pytest.mark.parametrize("stated_in", [("hf_quant_config.json",), ("config.json",)])
@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, mokernels.from_pretrained])
@pytest.mark.parametrize("format", ["FP8", "FP8_PB_WO", "NVFP4"])
def test_folders_that_state_the_quantization_in_one_file(tmp_path, format, load, stated_in):
    folder = export(tiny_model(), tmp_path, format, stated_in=stated_in)
    assert len(quantized_layers(load(folder))) == 14


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, mokernels.from_pretrained])
def test_a_folder_that_states_nothing_is_refused(tmp_path, load):
    folder = export(tiny_model(), tmp_path, "FP8", stated_in=())
    with pytest.raises(CheckpointError):
        load(folder)


def test_plain_models_are_left_alone(tmp_path):
    original = tiny_model()
    original.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(original))
    with pytest.raises(CheckpointError, match=r"not-modelopt.*Load it with transformers itself"):
        mokernels.from_pretrained(tmp_path)


def test_sharded_checkpoints(tmp_path):
    original = tiny_model()
    one = export(original, tmp_path / "one", "NVFP4")
    three = export(original, tmp_path / "three", "NVFP4", shards=3)
    a, b = (AutoModelForCausalLM.from_pretrained(folder) for folder in (one, three))
    assert torch.equal(logits(a), logits(b))


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_tied_embeddings(tmp_path, format):
    folder = export(tiny_model(tied=True), tmp_path / "in", format)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_resaves(model, folder, tmp_path / "out")


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_lm_head_is_not_tied_again(tmp_path, format, tied):
    original = tiny_model(tied=tied)
    folder = export(original, tmp_path / "in", format, exclude=())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.lm_head, QuantizedLinear)
    before = logits(model)
    model.tie_weights()
    assert isinstance(model.lm_head, QuantizedLinear)
    assert torch.equal(logits(model), before)
    assert model.config.tie_word_embeddings is tied
    assert_resaves(model, folder, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), before)


def test_the_base_model_of_a_causal_checkpoint(tmp_path):
    folder = export(tiny_model(), tmp_path, "FP8")
    base = AutoModel.from_pretrained(folder)
    assert len(quantized_layers(base)) == 14
    full = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, full.model(IDS).last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "auto"])
def test_dtype_is_that_of_everything_else(tmp_path, dtype):
    folder = export(tiny_model("Qwen2"), tmp_path, "FP8")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    layer = model.model.layers[0].self_attn.q_proj
    assert model.model.embed_tokens.weight.dtype == layer.bias.dtype == expected
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight_scale.dtype == layer.input_scale.dtype == torch.float32
    assert logits(model).isfinite().all()


def test_casting_a_loaded_model(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(export(tiny_model(), tmp_path, "NVFP4"))
    state = model.state_dict()
    before = {n: t.clone() for n, t in state.items() if "scale" in n or t.dtype == torch.uint8}
    model.to(torch.float32)
    assert model.lm_head.weight.dtype == torch.float32
    assert all(same_bytes(t, model.state_dict()[n]) for n, t in before.items())


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_activations_are_a_choice(tmp_path, format):
    folder = export(tiny_model(), tmp_path / "in", format)
    model = mokernels.from_pretrained(folder, activations="16bit")
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert {m.activation for m in layers} == {Activation.NONE}
    model.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "activations" not in saved["quantization_config"]


def test_the_choice_through_transformers_own_argument(tmp_path):
    folder = export(tiny_model(), tmp_path, "FP8_PB_WO")
    config = mokernels.ModelOptConfig(activations="fp8_block")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    assert {row.activations for row in mokernels.explain(model).layers} == {"E4M3, 1x128"}


def test_choices_that_do_not_fit_are_refused(tmp_path):
    folder = export(tiny_model(), tmp_path, "NVFP4")
    with pytest.raises(ArgumentError, match="does not fit a checkpoint in NVFP4"):
        mokernels.from_pretrained(folder, activations="fp8_block")
    with pytest.raises(ArgumentError, match="activations='fast' is not known"):
        mokernels.from_pretrained(folder, activations="fast")


def test_fp8_without_input_scales_is_quantized_per_token(tmp_path):
    folder = export(tiny_model(), tmp_path, "FP8", keep_tensor=lambda n: "input_scale" not in n)
    model = AutoModelForCausalLM.from_pretrained(folder)
    explanation = mokernels.explain(model)
    assert {row.activations for row in explanation.layers} == {"E4M3, per token"}
    assert "no input_scale" in explanation.layers[0].why


def test_kv_cache_scales_are_kept(tmp_path):
    names = [f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for i in range(2) for p in "kv"]
    extra = {name: torch.tensor(0.25 + i) for i, name in enumerate(names)}
    folder = export(tiny_model(), tmp_path / "in", "FP8", extra=extra)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.model.layers[1].self_attn.v_proj.v_scale == 3.25
    assert "4 KV-cache scales are kept" in str(mokernels.explain(model))
    assert_resaves(model, folder, tmp_path / "out")


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_cpu_and_disk_offload(tmp_path, format):
    names = [f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for i in range(2) for p in "kv"]
    extra = {name: torch.tensor(0.25 + i) for i, name in enumerate(names)}
    folder = export(tiny_model(), tmp_path / "in", format, extra=extra)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                  "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    split = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(split), logits(whole))
    assert_resaves(split, folder, tmp_path / "out")


def test_a_device_map_on_one_device(tmp_path):
    folder = export(tiny_model(), tmp_path, "MXFP8")
    model = mokernels.from_pretrained(folder, device_map="cpu")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_experts_that_no_model_takes_apart_are_refused_by_name(tmp_path):
    model = tiny_model("GptOss", num_local_experts=2, num_experts_per_tok=1)
    experts = "model.layers.0.mlp.experts."
    extra = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = f"{experts}0.{name}"
        extra[f"{layer}.weight"] = torch.ones(128, 128).to(torch.float8_e4m3fn)
        extra[f"{layer}.weight_scale"] = torch.ones(128)
    folder = export(model, tmp_path, "FP8_PER_CHANNEL_PER_TOKEN", extra=extra)
    with pytest.raises(CheckpointError, match=r"transposed or interleaved \(gpt-oss,") as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "experts.0.gate_proj" in str(error.value)


def test_a_layer_of_another_size_is_refused(tmp_path):
    folder = export(tiny_model(), tmp_path, "FP8")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(CheckpointError, match=r"layer-not-in-model.*mlp.gate_proj"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_missing_norm_is_refused(tmp_path):
    folder = export(tiny_model(), tmp_path, "FP8", keep_tensor=lambda n: n != "model.norm.weight")
    with pytest.raises(CheckpointError, match=r"tensor-missing.*model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_warnings_are_told(tmp_path, caplog):
    folder = export(tiny_model(), tmp_path, "FP8")
    file = folder / "hf_quant_config.json"
    quantization = json.loads(file.read_text())
    quantization["quantization"]["kv_cache_quant_algo"] = "FP8"
    file.write_text(json.dumps(quantization))
    with caplog.at_level(logging.WARNING, "mokernels"):
        AutoModelForCausalLM.from_pretrained(folder)
    assert "kv" in caplog.text.lower()


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, mokernels.from_pretrained])
@pytest.mark.parametrize("everything", [True, False])
def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path, load, everything):
    original = tiny_model()
    outside = export(original, tmp_path / "outside", "FP8", shards=2)
    folder = export(original, tmp_path / "in", "FP8", shards=2)
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    shards = sorted(set(weights["weight_map"].values()))
    moved = shards if everything else shards[:1]
    for name, shard in weights["weight_map"].items():
        if shard in moved:
            weights["weight_map"][name] = f"../{outside.name}/{shard}"
    index.write_text(json.dumps(weights))
    with pytest.raises(CheckpointError, match=r"\[file-name\].*outside of the folder"):
        load(folder)


def test_a_variant_that_was_not_audited_is_refused(tmp_path):
    folder = export(tiny_model(), tmp_path, "FP8")
    (folder / "model.evil.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"found model\.evil\.safetensors, wanted model\.safe"
    ):
        AutoModelForCausalLM.from_pretrained(folder, variant="evil")


def test_pickled_weights_are_refused(tmp_path):
    folder = export(tiny_model(), tmp_path, "FP8")
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    for load in (AutoModelForCausalLM.from_pretrained, mokernels.from_pretrained):
        with pytest.raises(CheckpointError, match="safetensors"):
            load(folder)
