"""Adapters train beside the frozen quantized layers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mokernels.layers import QuantizedLinear
from tests.compile.blocks import Checked
from tests.support.compare import assert_same_bits
from tests.support.models import export, tiny_model

peft = pytest.importorskip("peft", reason="PEFT is not installed")
DEQUANTIZE = {
    "FP8": "dequantize_fp8",
    "FP8_PER_CHANNEL_PER_TOKEN": "dequantize_fp8",
    "FP8_PB_WO": "dequantize_fp8",
    "NVFP4": "dequantize_nvfp4",
    "MXFP8": "dequantize_mxfp8",
}
FORMATS = list(DEQUANTIZE)


def gradients(run, model, ids):
    """Gradients of the adapters, by name, for one batch."""
    model.zero_grad()
    run(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def words(tensor):
    """The bytes, since FP8 tensors cannot be compared."""
    return tensor.reshape(-1).view(torch.uint8)


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
        assert torch.equal(words(state[name]), words(tensor)), name


@pytest.mark.parametrize("format", FORMATS)
def test_compiled_training_has_the_gradients_of_eager(tmp_path, format):
    torch._dynamo.reset()
    base = tiny_model(num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(export(base, tmp_path, format))
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, so that A would have no gradient
            torch.nn.init.normal_(parameter, 0, 0.02, torch.Generator().manual_seed(0))
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    checked = Checked()
    # While Dynamo traces it, transformers 5.17 takes another way through attention, unquantized
    # models as well (0.3 % of gradients): so eager is what Dynamo traced, run as it is.
    traced = torch.compile(model, backend="eager", fullgraph=True)
    expected = gradients(traced, model, ids)
    torch._dynamo.reset()
    found = gradients(torch.compile(model, backend=checked, fullgraph=True), model, ids)
    assert found.keys() == expected.keys()
    assert all("lora_" in name for name in found)
    for name, gradient in expected.items():
        assert_same_bits(found[name], gradient)
    forward, backward = checked.operators
    products = [name for name in forward if name.endswith(("_gemm", "_linear"))]
    assert len(products) == 7
    # Nothing before q, k and v trains: no gradient goes through them.
    assert backward == [DEQUANTIZE[format]] * 4
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(words(after[name]), words(before[name]))}
    assert changed == found.keys()
