"""The launches of a linear layer from the tensors that a checkpoint stores of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mokernels.formats import E2M1, Activation, Format, Granularity
from mokernels.ops.launch.decode import plan_mxfp8_decode, plan_nvfp4_decode
from mokernels.ops.launch.gemm import plan_fp8_weight_only
from mokernels.ops.launch.linear import (
    plan_fp8_block_linear,
    plan_fp8_linear,
    plan_fp8_per_token_linear,
    plan_mxfp8_linear,
    plan_nvfp4_linear,
)
from mokernels.ops.launch.product import Planned
from mokernels.ops.target import Target


def plan_layer(
    format: Format,
    activation: Activation,
    x: Tensor,
    leaves: Mapping[str, Tensor],
    *,
    target: Target,
) -> Planned:
    """What a layer without bias launches for x [..., K].

    Args:
        format: of the weight.
        activation: what happens to x.
        x: bf16, fp16 or fp32.
        leaves: the stored tensors by their leaves' names; scales of blocks as [N / 128, K / 128].
        target: the device.
    """
    weight = (leaves["weight"], leaves["weight_scale"])
    n = leaves["weight"].shape[0]
    quantized = activation is not Activation.NONE
    if format.element is E2M1:
        second = leaves["weight_scale_2"]
        if quantized:
            return plan_nvfp4_linear(
                x, *weight, second, leaves["input_scale"], None, n, target=target
            )
        return plan_nvfp4_decode(x, *weight, None, second, None, x.dtype, n, target=target)
    if format.granularity is Granularity.GROUP:
        if quantized:
            return plan_mxfp8_linear(x, *weight, None, n, target=target)
        return plan_mxfp8_decode(x, *weight, None, x.dtype, n, target=target)
    if activation is Activation.FP8_STATIC:
        scale = leaves["input_scale"]
        multiplier = leaves.get("input_multiplier")
        return plan_fp8_linear(x, *weight, scale, None, multiplier, n, target=target)
    plan = {
        Activation.NONE: plan_fp8_weight_only,
        Activation.FP8_PER_TOKEN: plan_fp8_per_token_linear,
        Activation.FP8_BLOCK: plan_fp8_block_linear,
    }[activation]
    return plan(x, *weight, None, n, target=target)
