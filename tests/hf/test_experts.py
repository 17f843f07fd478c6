"""Mixtures of experts: taken apart, quantized, loaded, and what cannot be."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import mokernels
from mokernels.errors import ArgumentError, CalibrationError, CheckpointError
from mokernels.hf.answers import Answer
from mokernels.hf.continuous import _batching_config as continuous_config
from mokernels.hf.engine import Engine
from mokernels.hf.experts import ExpertNames, Experts, expand, fused_experts
from mokernels.layers import QuantizedLinear
from tests.demo.tiny import byte_tokenizer
from tests.support.compare import assert_same_bits
from tests.support.models import MIXTURES, tiny_model

FORMATS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MXFP8")
PLACE = "model.layers.1.mlp.experts"


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (2, 16), generator=generator) for _ in range(count)]


def quantized(format, model, **options):
    options = {"unseen": "max", **options}
    return mokernels.quantize(model, format, batches(), progress=False, **options)


def is_fused(model) -> bool:
    return bool(fused_experts(model)) and not any(isinstance(m, Experts) for m in model.modules())


@pytest.mark.parametrize("architecture", MIXTURES)
def test_taken_apart_they_compute_what_they_did(architecture):
    model = tiny_model(architecture).float()
    ids = batches()[0]
    before = model(ids).logits
    replaced = expand(model, ExpertNames())
    assert replaced
    assert all(isinstance(model.get_submodule(place), Experts) for place in replaced)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)


def test_tokens_none_and_experts_that_are_not_there():
    fused = tiny_model("Qwen3Moe").float().get_submodule(PLACE)
    experts = Experts(fused, ExpertNames())
    nobody = torch.zeros(0, 2, dtype=torch.long)
    assert experts(torch.zeros(0, 128), nobody, torch.zeros(0, 2)).shape == (0, 128)
    x, weights = torch.randn(3, 128), torch.full((3, 2), 0.5)
    chosen = torch.tensor([[0, 4], [1, 2], [4, 4]])  # 4 is one beyond the last: of no expert
    result = experts(x, chosen, weights)
    assert not result[2].any()
    torch.testing.assert_close(result[0], 0.5 * experts._one(experts[0], x[:1])[0])
    both = 0.5 * (experts._one(experts[1], x[1:2]) + experts._one(experts[2], x[1:2]))
    torch.testing.assert_close(result[1], both[0])


@pytest.mark.parametrize(
    ("architecture", "format"),
    [("Qwen3Moe", format) for format in FORMATS]
    + [(other, "NVFP4") for other in MIXTURES if other != "Qwen3Moe"],
)
def test_the_whole_way_round(architecture, format, tmp_path):
    tiny_model(architecture).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    quantized(format, model)
    experts = model.get_submodule(PLACE)
    assert all(isinstance(m, QuantizedLinear) for e in experts for m in e.children())
    assert not list(experts.__dict__["fused"].parameters())  # their memory is let go
    folder = mokernels.export(model, tmp_path / "out")
    assert mokernels.check(folder).ok
    for load in (AutoModelForCausalLM.from_pretrained, mokernels.from_pretrained):
        again = load(folder)
        assert torch.equal(again(batches()[0]).logits, model(batches()[0]).logits)
    again.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert_same_bits(after[name], tensor)


@pytest.mark.parametrize("architecture", ["Mixtral", "Qwen3Moe"])
def test_names_are_those_of_the_original_checkpoint(architecture, tmp_path):
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "plain")
    plain = set(load_file(tmp_path / "plain" / "model.safetensors"))
    folder = mokernels.export(quantized("MXFP8", model), tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    assert {name for name in stored if not name.endswith("_scale")} == plain
    excluded = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    block = "block_sparse_moe" if architecture == "Mixtral" else "mlp"
    assert f"model.layers.0.{block}.gate" in excluded["exclude_modules"]


@pytest.mark.parametrize("format", ["FP8", "NVFP4", "MXFP8"])
def test_trained_and_packed(format, tmp_path):
    packed = quantized(format, tiny_model("Qwen3Moe"))
    model = quantized(format, tiny_model("Qwen3Moe"), trainable=True)
    model(batches()[0], labels=batches()[0]).loss.backward()
    weights = [e.up_proj.weight for e in model.get_submodule(PLACE)]
    assert any(weight.grad is not None and weight.grad.any() for weight in weights)
    folder = mokernels.export(model, tmp_path / "out")
    expected = mokernels.export(packed, tmp_path / "packed")
    assert (folder / "model.safetensors").read_bytes() == (
        expected / "model.safetensors"
    ).read_bytes()


def test_formats_of_a_mixture_may_differ(tmp_path):
    model = tiny_model("Mixtral")
    quantized({"*": "MXFP8", "*self_attn*": "FP8_PER_CHANNEL_PER_TOKEN"}, model)
    folder = mokernels.export(model, tmp_path / "out")
    again = mokernels.from_pretrained(folder)
    assert torch.equal(again(batches()[0]).logits, model(batches()[0]).logits)
    names = {layer.format for layer in mokernels.explain(again).layers}
    assert names == {"MXFP8", "FP8_PER_CHANNEL_PER_TOKEN"}


def test_plain_experts_stay_in_their_parameters(tmp_path):
    model = tiny_model("Qwen3Moe")
    quantized("FP8", model, exclude=["*.experts*"])
    assert is_fused(model)
    again = mokernels.from_pretrained(mokernels.export(model, tmp_path / "out"))
    assert is_fused(again)
    assert torch.equal(again(batches()[0]).logits, model(batches()[0]).logits)


def test_a_rare_expert_is_named():
    model = tiny_model("Qwen3Moe", num_experts=16)
    before = model(batches()[0]).logits
    with pytest.raises(CalibrationError, match=r"saw no data .*experts\.\d+\.gate_proj"):
        mokernels.quantize(model, "FP8", batches(1), progress=False)
    assert is_fused(model)  # as it was
    assert torch.equal(model(batches()[0]).logits, before)
    quantized("FP8", model)
    scales = [e.gate_proj.input_scale for e in model.get_submodule(PLACE)]
    assert len({float(scale) for scale in scales}) == 1  # one for all experts, as ModelOpt has it


def test_a_failure_puts_them_together_again(tmp_path):
    model = tiny_model("Mixtral")
    model.save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")

    def loop(model):
        raise RuntimeError("no data today")

    with pytest.raises(RuntimeError, match="no data today"):
        mokernels.quantize(model, "NVFP4", loop, progress=False)
    assert is_fused(model)
    model.save_pretrained(tmp_path / "again")
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("plain", "again")
    )
    assert before.keys() == after.keys()


def test_what_cannot_be_taken_apart_is_named(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("Qwen3Moe")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ArgumentError, match=r"experts 'model\.layers\.0\.mlp\.experts' are off"):
        quantized("MXFP8", model)
    biased = tiny_model("GptOss", num_local_experts=2, num_experts_per_tok=1)
    assert not fused_experts(biased)


def test_experts_that_may_compute_something_else_are_refused():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 64, 32))
            self.down_proj = nn.Parameter(torch.randn(2, 32, 32))

    model = tiny_model("Qwen3Moe")
    model.set_submodule(PLACE, Own())
    with pytest.raises(
        ArgumentError, match=r"experts 'model\.layers\.1\.mlp\.experts' of Qwen3Moe"
    ):
        quantized("MXFP8", model)


@pytest.mark.newest
def test_compiled_and_generated(tmp_path):
    folder = mokernels.export(quantized("FP8_PB_WO", tiny_model("Qwen3Moe")), tmp_path / "out")
    model = mokernels.from_pretrained(folder)
    ids = batches()[0]
    expected = model(ids).logits
    torch._dynamo.reset()
    with torch.no_grad(), torch._inductor.config.patch(emulate_precision_casts=True):
        compiled = torch.compile(model)(ids).logits
    assert torch.equal(compiled, expected)
    torch._dynamo.reset()
    tokens = mokernels.generate(model, ids, max_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 20)
    with pytest.raises(ArgumentError, match="its experts are chosen one after the other"):
        mokernels.generate(model, ids, compile=True, max_new_tokens=4)


def test_answers_in_batches(tmp_path):
    folder = mokernels.export(quantized("MXFP8", tiny_model("Qwen3Moe")), tmp_path / "out")
    byte_tokenizer().save_pretrained(folder)
    greedy = mokernels.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    answers = []
    for continuous in (False, True):
        model = mokernels.LLM(folder, continuous_batching=continuous, dtype=torch.float32)
        made = model.generate([[5, 6, 7], [9] * 6], greedy, use_tqdm=False)
        answers.append([answer.outputs[0].token_ids for answer in made])
    assert answers[0] == answers[1]
    engine, row = Engine(), Answer([1], greedy, 0, frozenset(), 4, str)
    assert not continuous_config(model.model, [row], engine).use_cuda_graph


def test_layers_that_the_class_leaves_in_the_files(tmp_path):
    model = quantized("MXFP8", tiny_model("DeepseekV3"))
    folder = mokernels.export(model, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    more = {
        name.replace("layers.1.", "layers.61."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    again = mokernels.from_pretrained(folder)
    assert torch.equal(again(batches()[0]).logits, model(batches()[0]).logits)
    other = {name.replace("layers.61.", "layers.7."): tensor for name, tensor in more.items()}
    save_file(tensors | other, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.7\.mlp"):
        mokernels.from_pretrained(folder)


def test_a_checkpoint_that_lacks_an_experts_scale_is_refused(tmp_path):
    folder = mokernels.export(quantized("MXFP8", tiny_model("Mixtral")), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.w3"):
        mokernels.from_pretrained(folder)


def test_projections_of_unknown_names_are_refused(tmp_path):
    folder = mokernels.export(quantized("MXFP8", tiny_model("Qwen3Moe")), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    other = {name.replace(".up_proj.", ".lift."): tensor for name, tensor in tensors.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match="of its experts down_proj, gate_proj, lift, wanted"):
        mokernels.from_pretrained(folder)


def test_adapters_beside_experts():
    peft = pytest.importorskip("peft")
    model = quantized("MXFP8", tiny_model("Qwen3Moe"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted(batches()[0], labels=batches()[0]).loss.backward()
    trained = [p for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(trained) == 2
    assert all(p.grad.any() for p in trained)  # through the experts of the layers behind


def test_back_to_bf16(tmp_path):
    plain = tiny_model("Mixtral")
    plain.save_pretrained(tmp_path / "plain")
    folder = mokernels.export(quantized("FP8", tiny_model("Mixtral")), tmp_path / "out")
    mokernels.dequantize(folder, tmp_path / "bf16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16")
    assert is_fused(again)
    for name, weight in plain.state_dict().items():
        found = again.state_dict()[name].float() - weight.float()
        assert found.norm() <= 0.04 * weight.float().norm(), name
    assert isinstance(again.get_submodule("model.layers.0.self_attn.q_proj"), nn.Linear)
