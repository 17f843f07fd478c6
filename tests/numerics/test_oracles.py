"""Against ModelOpt's own exports and its fake quantization of the same layers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mokernels import numerics

GOLDEN = Path(__file__).parents[1] / "data" / "checkpoints"
# Relative error of a layer's output. NVFP4 and MXFP8 exports encode exactly what ModelOpt's fake
# quantization computes, so only the order of addition is left. The FP8 exports round the weights
# differently from it (w / s instead of w * 448 / amax; FP8 per tensor through bf16 as well).
BUDGET = {"nvfp4": 1e-6, "mxfp8": 1e-6, "fp8_pc_pt": 6e-3, "fp8_pb_wo": 8e-3, "fp8": 4e-2}


def activations(name, x, tensors):
    if name == "fp8":
        multiplier, divisor = numerics.static_fp8_scales(tensors["input_scale"])
        return numerics.dequantize_fp8(numerics.quantize_fp8(x, multiplier), divisor)
    if name == "fp8_pc_pt":
        return numerics.dequantize_fp8(*numerics.quantize_fp8_per_token(x))
    if name == "mxfp8":
        return numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x))
    if name == "nvfp4":
        g = tensors["input_scale"]
        return numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(x, g), g)
    return x.float()


def weight(name, tensors):
    codes, scale = tensors["weight"], tensors["weight_scale"]
    if name == "nvfp4":
        return numerics.dequantize_nvfp4(codes, scale, tensors["weight_scale_2"])
    if name == "mxfp8":
        return numerics.dequantize_mxfp8(codes, scale)
    return numerics.dequantize_fp8(codes, scale)


@pytest.mark.parametrize("name", BUDGET)
def test_layers_agree_with_modelopt(name):
    stored = load_file(GOLDEN / name / "model.safetensors")
    oracle = load_file(GOLDEN / name / "oracle.safetensors")
    layers = [key[4:-3] for key in oracle if key.endswith(".xq")]
    assert len(layers) == 7
    for layer in layers:
        prefix = f"{layer}."
        tensors = {
            key.removeprefix(prefix): value
            for key, value in stored.items()
            if key.startswith(prefix)
        }
        xq = activations(name, oracle[f"lin.{layer}.x"], tensors)
        assert torch.equal(xq, oracle[f"lin.{layer}.xq"]), f"{layer}: xq is not bit-equal"
        y, expected = (
            numerics.scaled_product(xq, weight(name, tensors), None),
            oracle[f"lin.{layer}.y32"],
        )
        error = ((y - expected).norm() / expected.norm()).item()
        assert error <= BUDGET[name], f"{layer}: relative error {error:.2e}"
