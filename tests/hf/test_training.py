"""Adapters train beside the frozen quantized layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mokernels.layers import QuantizedLinear
from tests.support.models import export, tiny_model

peft = pytest.importorskip("peft", reason="PEFT is not installed")
FORMATS = ["FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "MXFP8"]


@pytest.mark.parametrize("format", FORMATS)
def test_lora_trains_and_leaves_the_codes_alone(tmp_path, format):
    model = AutoModelForCausalLM.from_pretrained(export(tiny_model(), tmp_path, format))
    codes = {n: t.clone() for n, t in model.state_dict().items() if t.dtype != torch.bfloat16}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=True)
    model = peft.get_peft_model(model, config)
    wrapped = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert len(wrapped) == 4
    assert all(isinstance(m.base_layer, QuantizedLinear) for m in wrapped)
    adapters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in adapters} <= {torch.float32, torch.bfloat16}
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    state = {n.replace("base_model.model.", "").replace(".base_layer", ""): t
             for n, t in model.state_dict().items()}  # fmt: skip
    for name, tensor in codes.items():
        assert torch.equal(state[name].reshape(-1).view(torch.uint8),
                           tensor.reshape(-1).view(torch.uint8)), name  # fmt: skip
