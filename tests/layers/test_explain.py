"""What explain says runs a layer, for every target; and its table."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mokernels
from mokernels.formats import FORMATS, Activation
from mokernels.layers import linear_class
from mokernels.layers.explain import kernel_family, triton_family
from mokernels.ops import configs, tuned
from mokernels.ops.configs import Kind
from mokernels.ops.table_files import Key, Table, Winner, write_table
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, SM_80, SM_90, SM_100, SM_120

explaining = sys.modules["mokernels.layers.explain"]  # the function hides the module


def layer(format, activation=None, k=256, n=128):
    row = FORMATS[format]
    return linear_class(row)(row, k, n, activation=activation, device="meta")


@pytest.mark.parametrize("target", [*CUDA_TARGETS, *HIP_TARGETS], ids=lambda t: t.name)
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_layer_has_a_kernel_and_a_reason_on_every_target(format, target):
    for activation in FORMATS[format].activations:
        kernel, why = triton_family(layer(format, activation), target)
        assert kernel in ("epilogue", "block", "decode", "native")
        assert why


@pytest.mark.parametrize(
    ("format", "activation", "target", "kernel", "why"),
    [
        ("FP8", None, SM_90, "epilogue", "applied once, after the product"),
        ("FP8", None, SM_80, "epilogue", "sm_80 has no FP8 product, codes are decoded"),
        ("FP8", Activation.NONE, SM_90, "epilogue", "decoded to the activations' dtype"),
        ("FP8_PB_WO", None, SM_90, "block", "on the fp32 accumulator"),
        ("FP8_PB_WO", Activation.FP8_BLOCK, SM_90, "block", "on the fp32 accumulator"),
        ("NVFP4", None, SM_90, "decode", "weights and activations are decoded to 16 bit exactly"),
        ("NVFP4", None, SM_100, "native", "sm_100 multiplies block-scaled operands itself"),
        ("MXFP8", None, SM_120, "native", "sm_120 multiplies block-scaled operands itself"),
        ("NVFP4", Activation.NONE, SM_100, "decode", "weights are decoded"),
    ],
)
def test_kernels_and_reasons(format, activation, target, kernel, why):
    found, reason = triton_family(layer(format, activation), target)
    assert found == kernel
    assert why in reason


@pytest.mark.parametrize(
    ("format", "activation", "target", "apart"),
    [
        ("FP8", None, SM_90, False),
        ("FP8", Activation.NONE, SM_90, True),
        ("FP8_PER_CHANNEL_PER_TOKEN", Activation.NONE, SM_80, True),
        ("FP8_PB_WO", None, SM_100, True),
        ("FP8_PB_WO", Activation.FP8_BLOCK, SM_90, False),
        ("MXFP8", None, SM_90, True),
        ("MXFP8", None, SM_100, False),
        ("MXFP8", Activation.NONE, SM_100, True),
        ("NVFP4", None, SM_90, True),
        ("NVFP4", None, SM_120, False),
    ],
)
def test_it_says_where_one_row_goes_apart(format, activation, target, apart):
    large, small = (layer(format, activation, 4096, n) for n in (4096, 128))
    reasons = [triton_family(one, target)[1] for one in (large, small)]
    weight_only_nvfp4 = format == "NVFP4" and activation is Activation.NONE
    assert ["one row by fp32 multiply-adds" in why for why in reasons] == [apart, weight_only_nvfp4]
    small.plan_n = 4096  # of the group it belongs to
    assert ("one row by" in triton_family(small, target)[1]) == apart


def test_on_the_cpu_the_reference_runs():
    kernel, why = kernel_family(layer("FP8"), torch.device("cpu"))
    assert kernel == "reference"
    assert "CPU" in why


def test_the_table():
    model = nn.ModuleDict({"a": layer("FP8"), "b": layer("FP8", Activation.NONE)})
    model["c"] = nn.Linear(2, 2)
    explanation = mokernels.explain(model)
    assert [row.name for row in explanation.layers] == ["a", "b"]
    text = str(explanation)
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "format", "activations", "kernel", "launch", "why"]
    assert {row.launch for row in explanation.layers} == {"-"}  # nothing is launched on a CPU
    assert "1 layer in FP8 (E4M3, static)" in text
    assert "activations='16bit' was asked for" in text
    assert lines[-1] == "1 not quantized: c"


def test_it_says_where_launches_come_from(monkeypatch, tmp_path):
    monkeypatch.setenv("MOKERNELS_CACHE", str(tmp_path))
    tuned.forget()
    device, target = torch.device("cuda"), replace(SM_90, device="Some GPU")
    monkeypatch.setattr(explaining, "target_of", lambda device: target)
    linear = layer("FP8")
    assert explaining.launch_source(linear, device) == "closed form"
    keys = [Key(Kind.FP8, rows, 128, 256) for rows in (16, 64)]
    winners = {key: Winner(configs.choose(*key, target), 1.0, 1.0) for key in keys}
    path = tuned.user_file("Some GPU")
    write_table(path, Table("Some GPU", "sm_90", "2.11.0", "3.6.0", "2026-01-31", winners))
    tuned.forget()
    assert explaining.launch_source(linear, device) == "measured for 2 of 7 ranges of rows"
    linear.plan_n = 512  # of a group that nobody has measured
    assert explaining.launch_source(linear, device) == "closed form"
    model = nn.ModuleList([Placed(device)])
    monkeypatch.setattr(explaining, "QuantizedLinear", Placed)
    (note,) = explaining._files(model)
    assert str(path) in note
    assert "(Some GPU, torch 2.11.0, triton 3.6.0, 2026-01-31)" in note
    tuned.forget()


class Placed(nn.Module):
    """A layer of which nothing but the device is looked at."""

    def __init__(self, device):
        super().__init__()
        self.weight = SimpleNamespace(device=device)


def test_a_model_without_quantized_layers():
    explanation = mokernels.explain(nn.Linear(2, 2))
    assert explanation.layers == ()
    assert len(explanation.unquantized) == 1
