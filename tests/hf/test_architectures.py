"""Whole models of several architectures under torch.compile: no graph break, every bit of eager."""

import pytest
import torch
import torch._inductor.config as inductor_config
from transformers import AutoModelForCausalLM

import mokernels
import mokernels.compile
from tests.compile.blocks import Checked
from tests.support.models import export, tiny_model

MODELS = {
    "Llama": "FP8_PER_CHANNEL_PER_TOKEN",
    "Qwen3": "NVFP4",
    "Mistral": "MXFP8",
    "Phi3": "FP8",
    "Gemma2": "FP8_PER_CHANNEL_PER_TOKEN",
    "Gemma3": "FP8",
}
CONFIGS = {"Gemma3": "Gemma3Text"}
SHARED = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
]


@pytest.fixture
def model(request, tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    name = request.param
    float_model = tiny_model(name, config=CONFIGS.get(name, name), num_hidden_layers=1)
    return AutoModelForCausalLM.from_pretrained(export(float_model, tmp_path, MODELS[name]))


def ids(tokens: int) -> torch.Tensor:
    found = torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    if tokens > 1:
        torch._dynamo.mark_dynamic(found, 1)
    return found


def sharing(graph) -> list[list[str]]:
    """Layers that share a quantization, group by group, below the model's first layer."""
    groups = [r.modules for r in graph.rewrites if r.what.startswith("one quantization")]
    return [[path.partition("layers.0.")[2] for path in paths] for paths in groups]


# Those that Inductor writes code for; it takes long, and test_compile.py does it for Llama.
@pytest.mark.newest
@pytest.mark.parametrize("model", ["Phi3", "Gemma2"], indirect=True)
def test_one_graph_has_the_bits_of_eager_for_all_lengths(model):
    already = len(mokernels.compile.report().graphs)
    # Without the setting Inductor keeps fp32 between fused bf16 operations, where eager rounds.
    exact = inductor_config.patch(emulate_precision_casts=True, force_disable_caches=True)
    with torch.no_grad(), exact:
        compiled = torch.compile(model, fullgraph=True)
        for tokens in (12, 2, 31):
            result = compiled(ids(tokens), use_cache=False).logits
            assert torch.equal(result, model(ids(tokens), use_cache=False).logits)
    (graph,) = mokernels.compile.report().graphs[already:]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    has_projections = hasattr(model.model.layers[0].self_attn, "k_proj")
    assert sharing(graph) == (SHARED if has_projections else [])


@pytest.mark.parametrize("model", ["Llama", "Qwen3", "Mistral", "Gemma3"], indirect=True)
def test_rewritten_graphs_have_the_bits_they_had_and_one_more_serves_single_tokens(model):
    checked = Checked()
    compiled = torch.compile(model, backend=checked, fullgraph=True)
    with torch.no_grad():
        for tokens in (9, 1, 20, 1):
            compiled(ids(tokens), use_cache=False)
    assert checked.graphs == 2
    assert [sharing(graph) for graph in checked.report.graphs] == [SHARED] * 2
