"""The whole way on a GPU: quantize, export, load, compile, capture, generate.

Compiled layers on a GPU may round otherwise than eager ones, and a random model is full of near
ties: so tokens are judged by the logits that an eager pass over them gives, not by their names.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import mokernels
from bench.support.llama import Decoder, Sizes, quantized
from bench.support.steps import EagerStep
from mokernels import LLM, SamplingParams
from mokernels.checkpoint import quantize_weight
from mokernels.formats import FORMATS
from mokernels.layers import QuantizedLinear, finish_loading, make_layer
from tests.demo.tiny import SIZES, byte_tokenizer
from tests.support.models import export, tiny_model

GOLDEN = Path(__file__).parents[1] / "data" / "checkpoints"
FIVE = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MXFP8")
SIXTEEN = {"max_new_tokens": 16, "min_new_tokens": 16}
WIDER = {"hidden_size": 256, "intermediate_size": 512, **SIZES}
# A random model is chaotic: one code that rounds to its neighbour moves its logits by a fifth, as
# seen between compiled and eager on a CPU. Unrelated logits are 1.4 apart.
NEAR = 0.4
# A token's logit below the greatest, in standard deviations; another token's is about 3 below.
SHORT = 1.2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch finds none"),
]


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", 0)


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    value, expected = value.float().cpu(), expected.float().cpu()
    return ((value - expected).norm() / expected.norm()).item()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def tokens(count: int, rows: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, 250, (rows, count), generator=generator)


def assert_greedy(model: nn.Module, ids: torch.Tensor, prompt: int) -> None:
    """Every token after the prompt has the greatest logit that an eager pass gives, or nearly."""
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, prompt - 1 : -1].float()
    chosen = logits.gather(-1, ids[:, prompt:, None])[..., 0]
    short = (logits.amax(-1) - chosen) / logits.std(-1)
    assert short.max() <= SHORT


@pytest.mark.parametrize("name", ["fp8", "fp8_pb_wo", "fp8_pc_pt", "mxfp8", "nvfp4"])
def test_layers_of_real_exports_give_modelopts_output(device, name):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.bfloat16)
    on_gpu = AutoModelForCausalLM.from_pretrained(
        GOLDEN / name, dtype=torch.bfloat16, device_map={"": device}
    )
    oracle = load_file(GOLDEN / name / "oracle.safetensors")
    layers = [key[4:-4] for key in oracle if key.endswith(".y32")]
    assert len(layers) == 7
    for layer in layers:
        x = oracle[f"lin.{layer}.x"].bfloat16()
        assert isinstance(on_gpu.get_submodule(layer), QuantizedLinear)
        with torch.no_grad():
            y = on_gpu.get_submodule(layer)(x.to(device))
            # Both round the result to bf16 once; most of them to the same value.
            assert relative(y, model.get_submodule(layer)(x)) <= 2e-3, layer
        assert relative(y, oracle[f"lin.{layer}.y32"]) <= 0.05, layer


@pytest.mark.parametrize("format", FIVE)
def test_quantize_export_load_compile_generate(device, format, tmp_path):
    model = tiny_model("Llama", **WIDER).to(device)
    batches = [{"input_ids": tokens(32, 2).to(device)} for _ in range(2)]
    mokernels.quantize(model, format, batches)
    mokernels.export(model, tmp_path / "m")
    ids = tokens(24).to(device)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        loaded = mokernels.from_pretrained(tmp_path / "m", device_map={"": device})
        assert torch.equal(loaded(input_ids=ids).logits, before)
        on_cpu = mokernels.from_pretrained(tmp_path / "m")
        assert relative(before, on_cpu(input_ids=ids.cpu()).logits) <= NEAR
        compiled = torch.compile(loaded, fullgraph=True)
        assert relative(compiled(input_ids=ids).logits, before) <= NEAR
    answer = mokernels.generate(loaded, {"input_ids": ids}, do_sample=False, **SIXTEEN)
    assert answer.shape == (1, 40)
    assert_greedy(loaded, answer, 24)


@pytest.mark.parametrize("format", FIVE)
def test_a_mixture_of_experts(device, format, tmp_path):
    model = tiny_model("Qwen3Moe", **WIDER).to(device)
    batches = [{"input_ids": tokens(32, 2).to(device)} for _ in range(2)]
    mokernels.quantize(model, format, batches, unseen="max")
    mokernels.export(model, tmp_path / "m")
    ids = tokens(24).to(device)
    loaded = mokernels.from_pretrained(tmp_path / "m", device_map={"": device})
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    answer = mokernels.generate(loaded, {"input_ids": ids}, do_sample=False, **SIXTEEN)
    assert_greedy(loaded, answer, 24)
    byte_tokenizer().save_pretrained(tmp_path / "m")
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    llm = LLM(tmp_path / "m", device_map={"": device}, continuous_batching=True)
    assert len(llm.generate("Hello", greedy, use_tqdm=False)[0].outputs[0].token_ids) == 4


@pytest.mark.parametrize("format", FIVE)
def test_quantizing_on_a_gpu_gives_the_bytes_of_a_cpu(device, format, tmp_path):
    for name, place in (("cpu", torch.device("cpu")), ("gpu", device)):
        model = tiny_model("Qwen2", **WIDER).to(place)
        batches = [{"input_ids": tokens(32, 2).to(place)}]
        mokernels.quantize(model, format, batches)
        mokernels.export(model, tmp_path / name)
    folders = [tmp_path / name / "model.safetensors" for name in ("cpu", "gpu")]
    with safe_open(folders[0], "pt") as first, safe_open(folders[1], "pt") as second:
        assert first.keys() == second.keys()
        for name in first.keys():  # noqa: SIM118  (a file, not a dictionary)
            here, there = first.get_tensor(name), second.get_tensor(name)
            if name.endswith("input_scale"):  # activations are sums, in another order
                torch.testing.assert_close(here, there, rtol=0.02, atol=0)
            else:
                assert torch.equal(bits(here), bits(there)), name


@pytest.mark.parametrize("format", ["FP8", "NVFP4"])
def test_offline_generation_with_and_without_continuous_batching(device, format, tmp_path):
    path = export(tiny_model("Llama", **WIDER), tmp_path / "m", format)
    byte_tokenizer().save_pretrained(path)
    prompts = ["Hello, my", "a", "What is the longest prompt of these?"]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for continuous in (False, True):
        llm = LLM(path, device_map={"": device}, continuous_batching=continuous, max_num_seqs=2)
        for output in llm.generate(prompts, greedy, use_tqdm=False):
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            assert len(ids) == len(output.prompt_token_ids) + 12
            assert_greedy(
                llm.model, torch.tensor([ids], device=device), len(output.prompt_token_ids)
            )


@pytest.mark.parametrize("format", FIVE)
def test_a_row_alone_has_the_bits_that_it_has_in_a_batch(device, format):
    row = FORMATS[format]
    linear = tiny_model("Llama", **WIDER).model.layers[0].mlp.down_proj
    layer = make_layer(linear, row)
    scale = {"FP8": 0.02, "NVFP4": 0.005}.get(format)
    for leaf, tensor in quantize_weight(row, linear.weight.detach(), input_scale=scale).items():
        getattr(layer, leaf).data.copy_(tensor.reshape(getattr(layer, leaf).shape))
    layer = layer.to(device)
    finish_loading(layer)
    x = torch.randn(300, 512, device=device, dtype=torch.bfloat16)
    with torch.no_grad(), mokernels.batch_invariant():
        together = layer(x)
        for rows in (1, 2, 17, 65, 299):
            assert torch.equal(layer(x[:rows]), together[:rows]), rows


@pytest.mark.parametrize("format", FIVE)
def test_a_deep_compiled_model_is_the_eager_one_layer_by_layer(device, format):
    model = Decoder(Sizes(1024, 3584, 32, 8, 2, 8192, 128), quantized(format), device, 1, 64)
    with torch.no_grad():
        check = EagerStep.of(model).check(model)
        model.compile_layers("inductor")
        assert check(model()) <= 1
