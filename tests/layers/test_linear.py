"""Quantized linear layers: names, dtypes, casts, state dicts, activations."""

import copy
import io

import pytest
import torch
from torch import nn

from mokernels import numerics
from mokernels.errors import ArgumentError
from mokernels.formats import FORMATS, Activation
from mokernels.layers import (
    FP8Linear,
    QuantizedLinear,
    StoredSpec,
    choose_activation,
    linear_class,
    make_layer,
)
from tests.support.models import quantized_tensors

N, K = 48, 160


def filled(format, activation=None, bias=True, **stored):
    """A layer in ``format`` with real codes, and the float weight that they came from."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=bias, dtype=torch.bfloat16)
    tensors = {**quantized_tensors(format, linear.weight.detach()), **stored}
    specs = {leaf: StoredSpec(t.dtype, tuple(t.shape)) for leaf, t in tensors.items()}
    layer = make_layer(linear, FORMATS[format], tensors=specs, activation=activation)
    state = {**tensors, **({"bias": linear.bias.detach()} if bias else {})}
    layer.load_state_dict(state)
    return layer, linear


ALL = sorted(FORMATS)
RUNS = [(name, activation) for name in ALL for activation in FORMATS[name].activations]


@pytest.mark.parametrize("format", ALL)
def test_tensors_are_the_checkpoints(format):
    layer, linear = filled(format)
    stored = quantized_tensors(format, linear.weight.detach())
    state = layer.state_dict()
    assert state.keys() == {*stored, "bias"}
    for leaf, tensor in stored.items():
        assert state[leaf].dtype == tensor.dtype
        assert state[leaf].shape == tensor.shape
    assert set(layer.stored_leaves) == set(stored)
    parameters = {name for name, _ in layer.named_parameters()}
    assert parameters == {leaf for leaf, t in stored.items() if t.dim()} | {"bias"}
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (K, N)


@pytest.mark.parametrize(("format", "activation"), RUNS)
def test_output_is_close_to_the_float_layer(format, activation):
    layer, linear = filled(format, activation)
    x = torch.randn(2, 3, K, dtype=torch.bfloat16)
    y, expected = layer(x), linear(x)
    assert y.dtype == x.dtype
    assert y.shape == expected.shape
    error = (y.float() - expected.float()).norm() / expected.float().norm()
    assert error < (0.25 if format == "NVFP4" else 0.08)


@pytest.mark.parametrize("format", ALL)
def test_weight_only_is_the_product_with_the_dequantized_weight(format):
    layer, _ = filled(format, Activation.NONE)
    x = torch.randn(5, K)
    expected = x @ layer.dequantized_weight().T + layer.bias.float()
    assert torch.allclose(layer(x), expected, rtol=1e-6, atol=1e-6)


CASTS = {
    "to": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double().float(),
    "to device and dtype": lambda m: m.to("cpu", torch.float16),
    "inside a container": lambda m: nn.Sequential(m).to(torch.float32)[0],
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("format", ALL)
def test_casts_leave_codes_and_scales_alone(format, cast):
    layer, _ = filled(format)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    after = cast(layer).state_dict()
    for name, tensor in before.items():
        if name != "bias":
            assert after[name].dtype == tensor.dtype, name
            assert torch.equal(after[name].reshape(-1).view(torch.uint8),
                               tensor.reshape(-1).view(torch.uint8)), name  # fmt: skip


def test_a_cast_reaches_the_bias():
    layer, _ = filled("FP8")
    assert layer.half().bias.dtype == torch.float16
    x = torch.randn(2, K, dtype=torch.float16)
    assert layer(x).dtype == torch.float16


@pytest.mark.parametrize("format", ALL)
def test_layers_are_copied_pickled_and_moved(format):
    layer, _ = filled(format)
    x = torch.randn(2, K)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for other in (copy.deepcopy(layer), loaded, layer.to("cpu")):
        assert torch.equal(other(x), layer(x))
    assert all(tensor.is_meta for tensor in layer.to("meta").state_dict().values())


def test_fp8_keeps_the_multiplier_and_its_reciprocal_up_to_date():
    layer, _ = filled("FP8")
    multiplier, divisor = numerics.static_fp8_scales(layer.input_scale)
    assert torch.equal(layer.input_multiplier, multiplier)
    assert torch.equal(layer.input_divisor, divisor)
    state = layer.state_dict()
    assert "input_multiplier" not in state
    layer.load_state_dict({**state, "input_scale": torch.tensor(0.5)})
    assert layer.input_multiplier == numerics.static_fp8_scales(torch.tensor(0.5))[0]


def test_fp8_without_the_derived_scales_computes_them():
    layer, _ = filled("FP8")
    x = torch.randn(3, K)
    expected = layer(x)
    layer.input_multiplier = layer.input_divisor = None
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_may_have_one_dimension(shape):
    scale = torch.full(shape, 6.0 / 448)
    layer, _ = filled("FP8", input_scale=scale)
    expected, _ = filled("FP8")
    x = torch.randn(3, K)
    assert layer.state_dict()["input_scale"].shape == shape
    assert torch.equal(layer(x), expected(x))


def test_block_scales_of_every_rank_mean_the_same():
    torch.manual_seed(0)
    weight = torch.randn(300, 260, dtype=torch.bfloat16)
    stored = quantized_tensors("FP8_PB_WO", weight)
    outputs = []
    for scale in (stored["weight_scale"], stored["weight_scale"][:, 0, :, 0].contiguous()):
        spec = StoredSpec(scale.dtype, tuple(scale.shape))
        linear = nn.Linear(260, 300, bias=False)
        codes = StoredSpec(torch.float8_e4m3fn, (300, 260))
        specs = {"weight": codes, "weight_scale": spec}
        layer = make_layer(linear, FORMATS["FP8_PB_WO"], tensors=specs)
        layer.load_state_dict({**stored, "weight_scale": scale})
        outputs.append(layer(torch.ones(2, 260)))
    assert torch.equal(*outputs)


def test_fresh_layers_know_modelopts_shapes():
    for format in FORMATS.values():
        layer = linear_class(format)(format, 256, 64, device="meta")
        for stored in format.tensors(64, 256):
            tensor = getattr(layer, stored.leaf)
            assert (tensor.dtype, tuple(tensor.shape)) == (stored.dtype, stored.shapes[0])
    assert linear_class(FORMATS["FP8"]) is FP8Linear


def test_explicit_activations_must_fit():
    with pytest.raises(ArgumentError, match=r"in NVFP4 cannot run with activations 'fp8_block'"):
        filled("NVFP4", Activation.FP8_BLOCK)


@pytest.mark.parametrize(
    ("format", "choice", "has_scale", "expected"),
    [
        ("FP8", "checkpoint", True, Activation.FP8_STATIC),
        ("FP8", "checkpoint", False, Activation.FP8_PER_TOKEN),
        ("FP8", "16bit", True, Activation.NONE),
        ("FP8_PB_WO", "checkpoint", False, Activation.NONE),
        ("FP8_PB_WO", "fp8_block", False, Activation.FP8_BLOCK),
        ("NVFP4", "checkpoint", True, Activation.NVFP4),
        ("MXFP8", "16bit", False, Activation.NONE),
    ],
)
def test_choice_of_activations(format, choice, has_scale, expected):
    assert choose_activation(FORMATS[format], choice, has_input_scale=has_scale) is expected


@pytest.mark.parametrize(
    ("format", "choice", "message"),
    [
        ("FP8", "8bit", "activations='8bit' is not known, wanted one of 'checkpoint', '16bit'"),
        ("NVFP4", "fp8_block", "does not fit a checkpoint in NVFP4; it is for FP8_PB_WO alone"),
    ],
)
def test_choices_that_do_not_exist_are_refused(format, choice, message):
    with pytest.raises(ArgumentError, match=message):
        choose_activation(FORMATS[format], choice)


def test_only_linear_layers_are_replaced():
    with pytest.raises(ArgumentError, match=r"layer 'a\.b' is a Conv2d, wanted torch\.nn\.Linear"):
        make_layer(nn.Conv2d(1, 1, 1), FORMATS["FP8"], name="a.b")
    with pytest.raises(
        ArgumentError, match=r"'a\.b' has 24 input features, wanted a multiple of 16"
    ):
        make_layer(nn.Linear(24, 8), FORMATS["NVFP4"], name="a.b")


def test_reset_parameters_changes_nothing():
    layer, _ = filled("MXFP8")
    before = layer.weight.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8))


def test_repr_says_format_and_activations():
    layer, _ = filled("FP8_PB_WO", Activation.FP8_BLOCK)
    assert isinstance(layer, QuantizedLinear)
    assert repr(layer) == (
        "FP8Linear(in_features=160, out_features=48, bias=True, format=FP8_PB_WO, "
        "activations=fp8_block)"
    )
