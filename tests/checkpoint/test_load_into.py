"""Loading into modules that are not transformers models."""

import pytest
import torch
from torch import nn

import mokernels
from mokernels.errors import ArgumentError, CheckpointError
from mokernels.formats import FORMATS
from mokernels.layers import QuantizedLinear
from tests.support.checkpoints import Linear, make_checkpoint


class Net(nn.Module):
    """A module with names of its own, a norm, a plain layer and a tensor that is no parameter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.norm = nn.LayerNorm(128, dtype=dtype)
        self.mlp = nn.ModuleDict(
            {
                "up": nn.Linear(128, 96, dtype=dtype),
                "down": nn.Linear(96, 128, bias=False, dtype=dtype),
            }
        )
        self.head = nn.Linear(128, 10, dtype=dtype)

    def forward(self, x):
        return self.head(x + self.mlp["down"](self.mlp["up"](self.norm(x)).relu()))


LAYERS = (Linear("mlp.up", 96, 128, bias=True), Linear("mlp.down", 128, 96))


def plain(**changes):
    torch.manual_seed(0)
    tensors = {
        "norm.weight": torch.rand(128) + 0.5,
        "norm.bias": torch.randn(128),
        "head.weight": torch.randn(10, 128),
        "head.bias": torch.randn(10),
    }
    tensors |= {name.replace("_", "."): value for name, value in changes.items()}
    return {name: value for name, value in tensors.items() if value is not None}


def checkpoint(folder, format="FP8", **changes):
    make_checkpoint(folder, format, LAYERS, plain=plain(**changes), exclude=("head",))
    return folder


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_linear_layers_are_replaced_and_everything_is_filled(tmp_path, format):
    folder = checkpoint(tmp_path / "c", format)
    net = Net()
    loaded = mokernels.load_into(net, folder)
    assert loaded is net
    assert isinstance(net.mlp["up"], QuantizedLinear)
    assert type(net.head) is nn.Linear
    assert torch.equal(net.head.weight, plain()["head.weight"])
    x = torch.randn(3, 128)
    hidden = x + net.mlp["down"](net.mlp["up"](net.norm(x)).relu())
    assert torch.equal(net(x), net.head(hidden))
    assert net.training, "the mode is kept"


def test_a_module_on_the_meta_device_is_created(tmp_path):
    folder = checkpoint(tmp_path / "c")
    with torch.device("meta"):
        empty = Net(torch.bfloat16)
    mokernels.load_into(empty, folder)
    real = mokernels.load_into(Net(torch.bfloat16), folder)
    x = torch.randn(2, 128, dtype=torch.bfloat16)
    assert not any(tensor.is_meta for tensor in empty.state_dict().values())
    assert torch.equal(empty(x), real(x))


def test_names_can_be_translated(tmp_path):
    folder = checkpoint(tmp_path / "c")
    wrapped = nn.ModuleDict({"net": Net()})
    mokernels.load_into(wrapped, folder, rename=lambda name: f"net.{name}")
    x = torch.randn(2, 128)
    assert torch.equal(wrapped["net"](x), mokernels.load_into(Net(), folder)(x))


def test_activations_are_a_choice(tmp_path):
    folder = checkpoint(tmp_path / "c", "NVFP4")
    net = mokernels.load_into(Net(), folder, activations="16bit")
    assert {row.activations for row in mokernels.explain(net).layers} == {"not quantized"}
    with pytest.raises(ArgumentError, match="does not fit a checkpoint in NVFP4"):
        mokernels.load_into(Net(), folder, activations="fp8_block")


def refused(folder, net, match, **options):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=match):
        mokernels.load_into(net, folder, **options)
    after = net.state_dict()
    assert before.keys() == after.keys(), "a refused checkpoint changes nothing"
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_missing_tensor_is_refused_unless_that_is_wanted(tmp_path):
    folder = checkpoint(tmp_path / "c", norm_bias=None)
    refused(folder, Net(), r"\[tensor-missing\].*the checkpoint lacks \(tensor 'norm\.bias'\)")
    net = Net()
    bias = net.norm.bias.clone()
    mokernels.load_into(net, folder, strict=False)
    assert torch.equal(net.norm.bias, bias)


def test_a_tensor_without_a_place_is_refused_unless_that_is_wanted(tmp_path):
    folder = checkpoint(tmp_path / "c", extra_scale=torch.ones(3))
    refused(folder, Net(), r"\[tensor-unexpected\].*no place.*'extra\.scale'")
    mokernels.load_into(Net(), folder, strict=False)


def test_another_size_is_refused(tmp_path):
    folder = checkpoint(tmp_path / "c", norm_weight=torch.ones(64))
    refused(folder, Net(), r"\[tensor-shape\].*'norm\.weight'.*found \[64\], wanted \[128\]")
    net = Net()
    net.mlp["up"] = nn.Linear(128, 100)
    found = r"\[layer-not-in-model\].*'mlp\.up'.*found Linear\(128, 100\), wanted Linear\(128, 96\)"
    refused(checkpoint(tmp_path / "d"), net, found)


def test_a_layer_of_another_kind_is_refused(tmp_path):
    net = Net()
    net.mlp["down"] = nn.Bilinear(96, 1, 128)
    refused(checkpoint(tmp_path / "c"), net, r"found Bilinear, wanted Linear\(96, 128\)")


def test_a_plain_layer_that_should_be_quantized_is_refused(tmp_path):
    make_checkpoint(tmp_path / "c", "FP8", LAYERS, plain=plain(), exclude=())
    refused(tmp_path / "c", Net(), r"neither quantized nor excluded.*linear layer of the model")
