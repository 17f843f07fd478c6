"""Fine-tuning fake-quantized models, packing them, and writing what was packed."""

import copy

import pytest
import torch

import mokernels
from mokernels.errors import ArgumentError, CalibrationError
from mokernels.formats import FORMATS
from mokernels.layers import FakeQuantizedLinear, QuantizedLinear
from tests.support.compare import assert_same_bits
from tests.support.models import tiny_model

QUIET = {"progress": False}
IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))


def trainable(format, dtype=torch.float32, **options):
    model = tiny_model(num_hidden_layers=1)
    if dtype != torch.bfloat16:  # which it has, but for the frequencies of its rotary embedding
        model = model.to(dtype)
    return mokernels.quantize(model, format, [IDS], trainable=True, **QUIET, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def train(model, steps=4):
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fake_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, FakeQuantizedLinear)}


@pytest.mark.parametrize("format", FORMATS)
def test_trained_weights_are_what_the_packed_model_multiplies(format):
    model = trainable(format)
    layers = fake_layers(model)
    assert len(layers) == 7
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    weights = {n: layer.fake_quantized_weight().detach() for n, layer in layers.items()}
    expected = logits(model)
    mokernels.convert(model, **QUIET)
    for name, weight in weights.items():
        packed = model.get_submodule(name)
        assert isinstance(packed, QuantizedLinear)
        assert_same_bits(packed.dequantized_weight(), weight)
    # The operands have the same bits; fp32 sums may be added in another order, which can move a
    # later activation across a rounding boundary.
    found = logits(model)
    assert (found - expected).norm() < 1e-2 * expected.norm()
    assert (found - expected).abs().median() < 1e-4


@pytest.mark.parametrize("format", FORMATS)
def test_one_layer_gives_the_packed_layers_result_but_for_the_order_of_addition(format):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(160, 48))
    x = torch.randn(5, 160)
    mokernels.quantize(model, format, lambda m: m(x), trainable=True, **QUIET)
    expected = model(2 * x).detach()  # some of it saturates
    found = mokernels.convert(model, **QUIET)(2 * x)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def files(folder):
    skipped = "mokernels_report.json"
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != skipped}


@pytest.mark.parametrize("format", ["FP8_PB_WO", "NVFP4"])
def test_untouched_weights_are_exported_to_the_same_bytes(tmp_path, format):
    options = {"kv_cache": "FP8"} if format == "NVFP4" else {}
    plain = tiny_model(num_hidden_layers=1)
    mokernels.quantize(plain, format, [IDS], **QUIET, **options)
    mokernels.export(plain, tmp_path / "plain", reload=False)
    model = trainable(format, torch.bfloat16, **options)
    mokernels.export(model, tmp_path / "trainable", reload=False)
    assert files(tmp_path / "trainable") == files(tmp_path / "plain")


def test_a_trained_model_is_exported_and_loads_with_its_logits(tmp_path):
    model = trainable("NVFP4")
    train(model, steps=1)
    expected = logits(model)
    mokernels.export(model, tmp_path / "out")
    loaded = mokernels.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_same_bits(logits(loaded), logits(model))
    assert (logits(loaded) - expected).norm() < 1e-2 * expected.norm()


def test_projections_of_one_input_share_their_scales():
    model = trainable("NVFP4")
    q, k, v = (fake_layers(model)[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv")
    with torch.no_grad():
        k.weight[0, 0] = 9.0
    assert q.shared_amax() == v.shared_amax() == 9.0
    mokernels.convert(model, **QUIET)
    attention = model.model.layers[0].self_attn
    scales = {float(getattr(attention, f"{n}_proj").weight_scale_2) for n in "qkv"}
    assert scales == {float(torch.tensor(9.0) / 2688)}


def test_state_dicts_copies_and_casts_keep_the_scales():
    model = trainable("FP8")
    other = copy.deepcopy(model)
    train(model, steps=1)
    other.load_state_dict(model.state_dict())
    assert_same_bits(logits(other), logits(model))
    scale = fake_layers(model)["model.layers.0.mlp.down_proj"].input_scale.clone()
    half = fake_layers(model.bfloat16())["model.layers.0.mlp.down_proj"]
    assert_same_bits(half.input_scale, scale)
    assert half.weight.dtype == torch.bfloat16
    assert "format=FP8, activations=fp8_static" in repr(half)
    assert "fake-quantized" in str(mokernels.explain(model))


def test_it_compiles_whole():
    torch._dynamo.reset()
    model = trainable("NVFP4")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, found = (run(input_ids=IDS, labels=IDS).loss for run in (model, compiled))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    found.backward()
    assert all(layer.weight.grad.isfinite().all() for layer in fake_layers(model).values())


def test_adapters_train_on_it_and_are_merged_before_the_export(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = trainable("NVFP4")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapted = peft.get_peft_model(model, config)
    losses = train(adapted)
    assert losses[-1] < losses[0]
    with pytest.raises(ArgumentError, match=r"q_proj' cannot be packed: it is a Linear.*merge_and"):
        mokernels.convert(model, **QUIET)
    merged = adapted.merge_and_unload()
    assert len(fake_layers(merged)) == 7
    expected = logits(merged)
    mokernels.export(merged, tmp_path / "out", reload=False)
    loaded = mokernels.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert (logits(loaded) - expected).norm() < 1e-2 * expected.norm()


def test_refusals():
    model = trainable("FP8")
    with pytest.raises(ArgumentError, match="holds fake-quantized layers already"):
        mokernels.quantize(model, "FP8", [IDS], **QUIET)
    with torch.no_grad():
        fake_layers(model)["model.layers.0.mlp.down_proj"].weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"down_proj' is empty or holds NaN"):
        mokernels.convert(model, **QUIET)
    assert len(fake_layers(model)) == 7
    with pytest.raises(ArgumentError, match="without fake-quantized layers"):
        mokernels.convert(tiny_model(num_hidden_layers=1), **QUIET)
    model = tiny_model(num_hidden_layers=1).to("meta")
    with pytest.raises(ArgumentError, match="is offloaded, and trainable=True trains weights in"):
        mokernels.quantize(model, "FP8", [IDS], trainable=True, **QUIET)
    with pytest.raises(ArgumentError, match="NVFP4 needs a calibrated input_scale"):
        FakeQuantizedLinear(torch.nn.Linear(16, 16), FORMATS["NVFP4"])
