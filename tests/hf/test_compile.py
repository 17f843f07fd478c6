"""torch.compile on a loaded model: no graph break, and the bits of eager on the CPU."""

from pathlib import Path

import pytest
import torch
import torch._inductor.config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parents[1] / "data" / "checkpoints"


@pytest.mark.newest
@pytest.mark.parametrize("name", ["fp8", "fp8_pc_pt", "fp8_pb_wo", "nvfp4", "mxfp8"])
@torch._inductor.config.patch(emulate_precision_casts=True)
def test_compiled_equals_eager_bit_for_bit(name):
    # Without the setting Inductor keeps fp32 between fused bf16 operations, where eager rounds.
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name)
    model.model.layers = model.model.layers[:1]  # compiling takes a time per layer
    ids = load_file(GOLDEN / name / "oracle.safetensors")["input_ids"]
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(compiled(ids).logits, expected)


def test_export_keeps_the_operators_as_nodes():
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "nvfp4")
    layer = model.model.layers[0].mlp.gate_proj
    x = torch.randn(3, 256, dtype=torch.bfloat16)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("m")},))
    targets = [node.target for node in program.run_decompositions().graph.nodes]
    assert targets.count(torch.ops.mokernels.nvfp4_linear.default) == 1
    assert torch.equal(program.module()(x), layer(x))
    longer = torch.randn(9, 256, dtype=torch.bfloat16)
    assert torch.equal(program.module()(longer), layer(longer))
