"""Which kinds of product the linear layers of a format launch."""

from __future__ import annotations

from mokernels.formats import E2M1, Activation, Format, Granularity
from mokernels.ops.config_tables import Kind
from mokernels.ops.configs import kind_of_fp8
from mokernels.ops.target import Target


def kind_of_layer(format: Format, activation: Activation, target: Target) -> Kind:
    """The kind of product of a layer with 16-bit activations that matrix units multiply.

    One row by an NVFP4 weight may be a GEMV instead, whose configuration nothing changes.
    MXFP8 products of fp16 activations that are not quantized, and all of fp32, are of Kind.FP32.

    Args:
        format: of the weight.
        activation: what happens to the activations.
        target: the device's kind.
    """
    quantized = activation is not Activation.NONE
    if format.granularity is Granularity.GROUP:
        if quantized and target.has_block_scaled_dot:
            return Kind.NVFP4 if format.element is E2M1 else Kind.MXFP8
        return Kind.HALF_NVFP4 if format.element is E2M1 else Kind.HALF_MXFP8
    blocks = format.granularity is Granularity.BLOCK
    if not quantized:
        return Kind.HALF_BLOCK if blocks else Kind.HALF_FP8
    return kind_of_fp8(target, blocks or activation is Activation.FP8_BLOCK, fast_accum=False)
