"""Which products the linear layers of a format launch."""

from __future__ import annotations

from mokernels.formats import E2M1, Activation, Format, Granularity
from mokernels.ops.configs import kind_of_fp8
from mokernels.ops.kinds import Kind
from mokernels.ops.quantizing import multiplies_row_by_e4m3_gemv, multiplies_row_by_gemv
from mokernels.ops.target import Target


def kind_of_layer(format: Format, activation: Activation, target: Target) -> Kind:
    """The kind of product of a layer with 16-bit activations that matrix units multiply.

    One row may be a GEMV instead (:func:`row_is_gemv`), whose configuration nothing changes.
    MXFP8 products of fp16 activations that are not quantized, and all of fp32, are of Kind.FP32.

    Args:
        format: of the weight.
        activation: what happens to the activations.
        target: the device's kind.
    """
    quantized = activation is not Activation.NONE
    if format.granularity is Granularity.GROUP:
        if quantized and has_dot(format, target):
            return Kind.NVFP4 if format.element is E2M1 else Kind.MXFP8
        return Kind.HALF_NVFP4 if format.element is E2M1 else Kind.HALF_MXFP8
    blocks = format.granularity is Granularity.BLOCK
    if not quantized:
        return Kind.HALF_BLOCK if blocks else Kind.HALF_FP8
    return kind_of_fp8(target, blocks or activation is Activation.FP8_BLOCK, fast_accum=False)


def row_is_gemv(format: Format, activation: Activation, n: int, k: int, target: Target) -> bool:
    """Whether one row of 16-bit activations is multiplied by fp32 multiply-adds.

    Batch-invariant launches never do that.

    Args:
        format: of the weight.
        activation: what happens to the activations.
        n: rows of the weight; of the fused group, if it belongs to one.
        k: elements that are summed.
        target: the device's kind.
    """
    quantized = activation is not Activation.NONE
    if format.granularity is not Granularity.GROUP:
        return not quantized and multiplies_row_by_e4m3_gemv(1, n, k)
    if quantized and has_dot(format, target):
        return False
    if format.element is E2M1:
        return multiplies_row_by_gemv(1, n, k, quantized)
    return multiplies_row_by_e4m3_gemv(1, n, k)


def has_dot(format: Format, target: Target) -> bool:
    """Whether the target's matrix units multiply a format of groups, scales included."""
    return target.has_nvfp4_dot if format.element is E2M1 else target.has_mxfp8_dot
