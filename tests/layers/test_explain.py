"""What explain says runs a layer, for every target; and its table."""

import pytest
import torch
from torch import nn

import mokernels
from mokernels.formats import FORMATS, Activation
from mokernels.layers import linear_class
from mokernels.layers.explain import kernel_family, triton_family
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, SM_80, SM_90, SM_100, SM_120


def layer(format, activation=None):
    row = FORMATS[format]
    return linear_class(row)(row, 256, 128, activation=activation, device="meta")


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
    assert lines[0].split() == ["layer", "format", "activations", "kernel", "why"]
    assert "1 layer in FP8 (E4M3, static)" in text
    assert "activations='16bit' was asked for" in text
    assert lines[-1] == "1 not quantized: c"


def test_a_model_without_quantized_layers():
    explanation = mokernels.explain(nn.Linear(2, 2))
    assert explanation.layers == ()
    assert len(explanation.unquantized) == 1
