"""mokernels.quantize and mokernels.export on models of transformers, and what they refuse."""

import errno
import json
import shutil

import accelerate
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import mokernels
from mokernels import CalibrationError, calibration
from mokernels.errors import ArgumentError, CheckpointError, MokernelsError
from mokernels.formats import FORMATS
from mokernels.layers import QuantizedLinear
from mokernels.ptq.record import quantization_of
from tests.demo.tiny import byte_tokenizer, save_model
from tests.support.models import tiny_model

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (2, 12), generator=generator) for _ in range(count)]


def quantized(format="FP8", model=None, loop=None, **options):
    model = model or tiny_model()
    loop = batches() if loop is None else loop
    return mokernels.quantize(model, format, loop, progress=False, **options)


def is_float(model) -> bool:
    """Whether the model is as it was: nothing quantized, no hook left."""
    modules = list(model.modules())
    hooks = [m for m in modules if m._forward_hooks or m._forward_pre_hooks]
    return not hooks and not any(isinstance(m, QuantizedLinear) for m in modules)


@pytest.mark.parametrize("format", FORMATS)
def test_it_runs_at_once_and_the_export_loads_to_the_same_bits(format, tmp_path):
    model = tiny_model(tied=True)
    original = model(batches()[0]).logits.float()
    assert mokernels.quantize(model, format, batches(), progress=False) is model
    logits = model(batches()[0]).logits
    assert 0 < (logits.float() - original).norm() < 0.5 * original.norm()
    assert mokernels.export(model, tmp_path / "out") == tmp_path / "out"
    assert mokernels.check(tmp_path / "out").ok
    loaded = mokernels.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(batches()[0]).logits, logits)
    report = json.loads((tmp_path / "out" / "mokernels_report.json").read_text())
    assert report["reload"] == {"tokens": 16, "equal": True, "difference": 0.0}
    assert report["layers"][Q]["format"] == format
    assert report["excluded"] == ["lm_head", "model.embed_tokens"]


def test_a_function_calibrates_as_batches_do():
    def loop(model):
        assert not model.training
        for ids in batches():
            model(input_ids=ids)

    model = tiny_model().train()
    by_function = quantization_of(quantized("NVFP4", model, loop))
    assert model.training
    assert by_function.amax == quantization_of(quantized("NVFP4")).amax
    assert by_function.batches == 3


def test_any_module_can_be_quantized_but_not_exported(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64, bias=False)

        def forward(self, x):
            return self.down(self.up(x).relu())

    torch.manual_seed(0)
    model, x = Both(), torch.randn(5, 64)
    expected = model(x)
    mokernels.quantize(model, "FP8", lambda m: m(x), progress=False)
    assert isinstance(model.up, QuantizedLinear)
    assert (model(x) - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(ArgumentError, match="given a Both, wanted a model of transformers"):
        mokernels.export(model, tmp_path / "out")


def test_kv_cache_scales_are_those_of_keys_and_values(tmp_path):
    model, seen = tiny_model(), {}

    def remember(name):
        def hook(module, args, output):
            seen[name] = max(seen.get(name, 0.0), float(output.abs().max()))

        return hook

    for name in ("k_proj", "v_proj"):
        module = model.model.layers[0].self_attn.get_submodule(name)
        module.register_forward_hook(remember(name))
    loop = batches()
    quantized("MXFP8", model, loop, kv_cache="fp8")
    attention = model.model.layers[0].self_attn
    # Values are what their projection makes; keys are rotated, which keeps the norm of pairs.
    assert float(attention.v_proj.v_scale) == pytest.approx(seen["v_proj"] / 448, rel=1e-6)
    assert 0.5 < float(attention.k_proj.k_scale) * 448 / seen["k_proj"] < 1.5
    mokernels.export(model, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())
    assert written["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_excluded_layers_stay_plain_and_are_listed(tmp_path):
    model = quantized("FP8", exclude=["*self_attn*", DOWN])
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds[Q] == kinds[DOWN] == "Linear"
    assert kinds["model.layers.0.mlp.down_proj"] == "FP8Linear"
    assert quantization_of(model).exclude == (
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.self_attn*",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.self_attn*",
    )
    mokernels.export(model, tmp_path / "out")


@pytest.mark.parametrize("observer", ["percentile", {"percentile": 90}, "mse"])
def test_other_observers_find_smaller_amax(observer):
    largest = quantization_of(quantized("NVFP4")).amax
    found = quantization_of(quantized("NVFP4", observer=observer)).amax
    assert all(0 < found[name] <= largest[name] for name in largest)
    assert found != largest


# ---------------------------------------------------------------- bad input, nothing lost


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (None, r"FP8 needs calibrated activation scales, and no forward_loop was given"),
        ([], r"never called the model, so that no layer saw data"),
        (lambda model: None, r"never called the model"),
    ],
    ids=["none", "no batches", "a function that does nothing"],
)
def test_calibration_without_data(loop, message):
    model = tiny_model()
    with pytest.raises(CalibrationError, match=message):
        mokernels.quantize(model, "FP8", loop, progress=False)
    assert is_float(model)


def test_a_kv_cache_needs_data_where_the_format_does_not():
    with pytest.raises(CalibrationError, match="The KV cache needs calibrated activation scales"):
        mokernels.quantize(tiny_model(), "MXFP8", kv_cache="FP8", progress=False)


def test_nan_activations_are_named_and_the_model_is_left_alone():
    model = tiny_model()
    model.model.layers[0].input_layernorm.weight.data[3] = torch.nan
    with pytest.raises(CalibrationError, match=rf"input of the layer '{Q}' holds NaN .* in call 1"):
        quantized("FP8", model)
    assert is_float(model)


def test_nan_weights_are_named_before_calibration():
    model, called = tiny_model(), []
    model.get_submodule(DOWN).weight.data[0, 0] = torch.inf
    with pytest.raises(CalibrationError, match=rf"weight of the layer '{DOWN}' is empty or holds"):
        quantized("FP8", model, called.append)
    assert not called


class Skipping(nn.Module):
    """The second of two layers never sees data."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.used = nn.ModuleDict({"up": nn.Linear(32, 32)})
        self.rare = nn.ModuleDict({"up": nn.Linear(32, 32)})

    def forward(self, x):
        return self.used["up"](x)


@pytest.mark.parametrize(
    ("unseen", "amax"), [("max", 3.0), (7.0, 7.0), ("error", None)], ids=["max", "number", "error"]
)
def test_layers_that_saw_no_data(unseen, amax):
    model, options = Skipping(), {"exclude": ["experts*"], "unseen": unseen}
    run = lambda m: m(torch.full((2, 32), 3.0))  # noqa: E731
    if amax is None:
        with pytest.raises(CalibrationError, match=r"1 layer saw no data .* 'rare\.up'"):
            quantized("FP8", model, run, **options)
        assert is_float(model)
    else:
        record = quantization_of(quantized("FP8", model, run, **options))
        assert record.amax["rare.up"] == amax
        assert record.filled == ("rare.up",)


def test_features_that_do_not_divide_are_named_with_a_remedy():
    model = tiny_model(intermediate_size=200)
    with pytest.raises(ArgumentError) as caught:
        quantized("NVFP4", model)
    text = str(caught.value)
    assert "'model.layers.0.mlp.down_proj' has 200 input features, wanted a multiple of 16" in text
    assert "exclude=['model.layers.0.mlp.down_proj', 'model.layers.1.mlp.down_proj']" in text
    quantized("NVFP4", model, exclude=["*down_proj"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observer": "median"}, "observer='median' is not known"),
        ({"observer": {"percentile": 0}}, "percentile=0.0 is no share"),
        ({"unseen": "guess"}, "unseen='guess' is not known"),
        ({"unseen": -1}, "unseen=-1 is not known"),
        ({"exclude": "*"}, "Nothing of LlamaForCausalLM would be quantized"),
    ],
)
def test_wrong_arguments_are_refused_before_the_data(options, message):
    called = []
    with pytest.raises(ArgumentError, match=message):
        quantized("FP8", loop=called.append, **options)
    assert not called


def test_a_quantized_model_is_not_quantized_again():
    with pytest.raises(ArgumentError, match="holds quantized layers already"):
        quantized("FP8", quantized("FP8"))


def test_experts_in_one_tensor_are_refused_by_name():
    model = tiny_model("GptOss", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ArgumentError, match=r"experts 'model\.layers\.0\.mlp\.experts' of GptOss"):
        quantized("FP8", model)
    quantized("FP8", model, exclude=["*experts*"])


@pytest.mark.parametrize("what", ["occupied", "no parent", "full"])
def test_the_destination_is_checked_before_the_data(what, tmp_path, monkeypatch):
    called, target = [], tmp_path / "out"
    if what == "occupied":
        target.mkdir()
        (target / "config.json").write_text("{}")
    if what == "no parent":
        target = tmp_path / "missing" / "out"
    if what == "full":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    messages = {
        "occupied": "exists and is not empty; nothing is overwritten",
        "no parent": "is no folder that can be written to",
        "full": r"has 0\.0 GB left, wanted about 0\.0 GB",
    }
    with pytest.raises(ArgumentError, match=messages[what]):
        quantized("FP8", loop=called.append, out_dir=target)
    assert not called


# ---------------------------------------------------------------- interrupted


class Interrupted:
    """Batches of which the third does not come."""

    def __len__(self):
        return 4

    def __iter__(self):
        yield from batches(4)[:2]
        raise KeyboardInterrupt


def test_an_interrupted_calibration_goes_on(tmp_path):
    model, file = tiny_model(), tmp_path / "state.json"
    with pytest.raises(KeyboardInterrupt):
        quantized("NVFP4", model, Interrupted(), resume=file, observer="percentile")
    assert is_float(model)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(1))
    quantized("NVFP4", model, batches(4), resume=file, observer="percentile")
    assert len(seen) == 2
    whole = quantization_of(quantized("NVFP4", loop=batches(4), observer="percentile"))
    assert quantization_of(model).amax == whole.amax


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}', "other model"])
def test_a_state_that_does_not_belong_is_refused(content, tmp_path):
    file = tmp_path / "state.json"
    file.write_text(content)
    message = "is no state of a calibration"
    if content == "other model":
        file.unlink()
        quantized("FP8", tiny_model(num_hidden_layers=1), resume=file)
        message = "belongs to another model, configuration or version"
    with pytest.raises(CalibrationError, match=message):
        quantized("FP8", resume=file)


def test_a_function_cannot_be_resumed(tmp_path):
    with pytest.raises(ArgumentError, match=r"resume= needs batches, which can be counted"):
        quantized("FP8", loop=lambda model: None, resume=tmp_path / "state.json")


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    model = quantized("FP8")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mokernels.hf.export.write_report", full)
        with pytest.raises(OSError, match="No space left"):
            mokernels.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    mokernels.export(model, tmp_path / "out")  # nothing was lost


def test_an_occupied_folder_is_not_overwritten(tmp_path):
    model = quantized("FP8")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="folder-occupied"):
        mokernels.export(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_model_that_was_cast_is_found_out(tmp_path):
    model = tiny_model().float()
    model.to(torch.bfloat16)
    quantized("FP8", model)
    with pytest.raises(MokernelsError, match=r"The buffer 'model\.rotary_emb\.inv_freq' is not"):
        mokernels.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    mokernels.export(model, tmp_path / "out", reload=False)


def test_a_model_that_was_never_quantized_is_not_exported(tmp_path):
    with pytest.raises(ArgumentError, match=r"mokernels\.quantize has not quantized in this proc"):
        mokernels.export(tiny_model(), tmp_path / "out")


# ---------------------------------------------------------------- models that are no decoders

NARROW = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
T5_SIZES = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}


def bert(kind):
    config = transformers.BertConfig(hidden_size=64, intermediate_size=128, **NARROW)
    return getattr(transformers, kind)(config)


def classifier():
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_key_value_heads=2, pad_token_id=0, **NARROW
    )
    return transformers.LlamaForSequenceClassification(config)


def t5():
    config = transformers.T5Config(vocab_size=128, decoder_start_token_id=0, **T5_SIZES)
    return transformers.T5ForConditionalGeneration(config)


OTHERS = {
    "masked": lambda: bert("BertForMaskedLM"),
    "embedding": lambda: bert("BertModel"),
    "classifier": classifier,
    "t5": t5,
}


@pytest.mark.parametrize("format", ["FP8", "NVFP4"])
@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_are_no_decoders(kind, format, tmp_path):
    torch.manual_seed(0)
    OTHERS[kind]().save_pretrained(tmp_path / "plain")
    model = type(OTHERS[kind]()).from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)

    def run(model, ids):
        both = {"input_ids": ids, "decoder_input_ids": ids}
        output = model(**both) if kind == "t5" else model(ids)
        return output[0]

    quantized(format, model, lambda model: [run(model, ids) for ids in batches()])
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    folder = mokernels.export(model, tmp_path / "out")
    assert mokernels.check(folder).ok
    again = type(model).from_pretrained(folder)
    assert torch.equal(run(again, batches()[0]), run(model, batches()[0]))
    report = json.loads((folder / "mokernels_report.json").read_text())
    assert report["reload"]["equal"]


def test_layers_that_a_model_wants_in_fp32_stay_plain(caplog):
    model = t5().to(torch.bfloat16)
    quantized("MXFP8", model)
    assert type(model.encoder.block[1].layer[1].DenseReluDense.wo) is nn.Linear
    assert isinstance(model.encoder.block[1].layer[1].DenseReluDense.wi, QuantizedLinear)
    assert "4 layers stay plain, since T5ForConditionalGeneration reads" in caplog.text
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in caplog.text
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in quantization_of(model).exclude


class Pooled(nn.Module):
    """Attention of torch, which multiplies by the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.projection = nn.Linear(64, 64)

    def forward(self, x):
        return self.attention(x, x, self.projection(x))[0]


def test_a_layer_that_attention_reads_stays_plain(caplog):
    model = Pooled()
    quantized("MXFP8", model)
    assert isinstance(model.projection, QuantizedLinear)
    assert not isinstance(model.attention.out_proj, QuantizedLinear)
    assert "1 layers stay plain, since Pooled reads" in caplog.text
    assert model(torch.randn(1, 3, 64)).isfinite().all()


class Doubled(nn.Linear):
    """A linear layer that is none."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_computes_something_else_stays_plain(caplog):
    model = nn.Sequential(Doubled(64, 64), nn.Linear(64, 64))
    quantized("MXFP8", model)
    assert type(model[0]) is Doubled
    assert isinstance(model[1], QuantizedLinear)
    assert "lets them compute something else: 0" in caplog.text


def test_weights_the_other_way_round_are_named():
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=128)
    with pytest.raises(ArgumentError, match=r"4 layers like 'transformer\.h\.0\.attn\.c_attn' are"):
        quantized("FP8", transformers.GPT2LMHeadModel(config))


def test_a_model_that_does_not_run_on_tokens_alone(tmp_path):
    class Needy(transformers.LlamaForCausalLM):
        def forward(self, input_ids, answer=None, **kwargs):
            if answer is None:
                raise ValueError("where is the answer?")
            return super().forward(input_ids, **kwargs)

    model = Needy(tiny_model().config).to(torch.bfloat16)
    quantized("FP8", model, lambda model: model(batches()[0], answer=42))
    expected = "does not run on input_ids alone .ValueError: where is the answer"
    with pytest.raises(MokernelsError, match=expected):
        mokernels.export(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- offloaded layers, the tokenizer


def offloaded(kind, folder):
    """A model of which all or some weights are elsewhere."""
    save_model(folder / "plain")
    if kind == "accelerate":
        model = AutoModelForCausalLM.from_pretrained(folder / "plain")
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    parts = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    device_map = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "plain",
        device_map=device_map | {"model.layers.1": "disk"},
        offload_folder=folder / "offloaded",
    )


@pytest.mark.parametrize("format", ["FP8", "FP8_PB_WO", "NVFP4"])
@pytest.mark.parametrize("kind", ["accelerate", "device_map"])
def test_layers_that_are_offloaded(tmp_path, kind, format):
    model = offloaded(kind, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    name = "model.layers.1.self_attn.k_proj"
    assert model.get_submodule(name).weight.is_meta
    for each, folder in ((model, "ours"), (whole, "theirs")):
        quantized(format, each, kv_cache="FP8", out_dir=tmp_path / folder)
        mokernels.export(each, tmp_path / folder)
    assert model.get_submodule(name).weight.is_meta
    assert not model.get_submodule(name).k_scale.is_meta
    ids = batches()[0]
    assert torch.equal(model(ids).logits, whole(ids).logits)
    for file in ("model.safetensors", "config.json", "hf_quant_config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    report = json.loads((tmp_path / "ours" / "mokernels_report.json").read_text())
    assert report["reload"]["equal"]
    assert hasattr(model, "hf_device_map") == (kind == "device_map")


def test_the_originals_tokenizer_comes_along(tmp_path):
    from transformers import AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "m"))
    data = calibration.text(byte_tokenizer(), ["some text " * 40], samples=4, length=32)
    assert [batch["input_ids"].shape for batch in data] == [(4, 32)]
    mokernels.quantize(model, "FP8", data, progress=False)
    mokernels.export(model, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hi").input_ids


def test_progress_is_told_in_steps():
    from contextlib import contextmanager

    steps = {}

    @contextmanager
    def step(title):
        calls = steps[title] = []
        yield lambda done, total: calls.append((done, total))

    mokernels.quantize(tiny_model(), "FP8", batches(), progress=step)
    assert steps["calibrate"] == [(1, 3), (2, 3), (3, 3)]
    assert steps["quantize weights"][-1] == (14, 14)
