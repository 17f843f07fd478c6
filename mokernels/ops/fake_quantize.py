"""Fake quantization operators for training: ``torch.ops.mokernels.fake_quantize_*``.

Every one takes x and gives back dequantize(quantize(x)), contiguous, in x's dtype (bf16, fp16 or
fp32) and of its shape: the bits of the two functions of :mod:`mokernels.numerics`, the second told
to round to x's dtype. In fp32 that is what a quantized layer multiplies.

==========================  ===========================  ===========================================
operator                    x                            scale
==========================  ===========================  ===========================================
fake_quantize_fp8           activations [..., K]         given: the checkpoint's ``input_scale``
fake_quantize_fp8_per_token activations [..., K]         of each token
fake_quantize_nvfp4         activations [..., K]         of each block, times the given global scale
fake_quantize_mxfp8         activations or weight        of each block
fake_quantize_fp8_weight    weight [N, K]                of the tensor, of each row ("channel"), of
                                                         each 128x128 block; with ``amax`` that of
                                                         the tensor or of every block
fake_quantize_nvfp4_weight  weight [N, K]                of each block, times the global scale
                                                         (None: the weight's own)
==========================  ===========================  ===========================================

Gradient. Rounding counts as the identity (the straight-through estimator, Bengio et al. 2013,
arXiv:1308.3432). Where x is beyond the largest magnitude that a *given* scale can represent, the
result is a constant, and so the gradient is 0: what the clamp of the forward has, and what ModelOpt
does with ``pass_through_bwd=False``. Without it a weight before a saturated activation would be
pushed on as if that still helped. A scale that is computed from x itself grows with x, so that
nothing saturates and the gradient is 1 everywhere. Scales get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mokernels.numerics as numerics
from mokernels.errors import ArgumentError
from mokernels.formats import E2M1_MAX, E4M3_MAX, MXFP8_BLOCK, NVFP4_BLOCK, Granularity
from mokernels.ops.checks import check_float, check_multiple, check_scalar, describe
from mokernels.ops.registry import LIBRARY, NAMESPACE, Function, register

_GRANULARITIES = tuple(
    each.value for each in (Granularity.TENSOR, Granularity.CHANNEL, Granularity.BLOCK)
)
# A stored scale is the amax divided and rounded, and the largest value is that times 448 or 2688,
# rounded: the calibrated amax itself must not count as saturated for an ulp or two.
_ALLOWANCE = 1 + 2.0**-20
_SMALLEST_GLOBAL_SCALE = 1e-12


def _check_fp8(x: Tensor, scale: Tensor) -> None:
    check_float("fake_quantize_fp8", "x", x)
    check_scalar("fake_quantize_fp8", "scale", scale)


def _fp8(x: Tensor, scale: Tensor) -> Tensor:
    multiplier, divisor = numerics.static_fp8_scales(scale.reshape(()))
    codes = numerics.quantize_fp8(x, multiplier)
    return numerics.dequantize_fp8(codes, divisor, x.dtype)


def _fp8_largest(scale: Tensor) -> Tensor:
    """The largest magnitude that codes with a stored scale stand for: 448 / m."""
    return E4M3_MAX * numerics.static_fp8_scales(scale.reshape(()))[1]


def _check_fp8_per_token(x: Tensor) -> None:
    check_float("fake_quantize_fp8_per_token", "x", x)


def _fp8_per_token(x: Tensor) -> Tensor:
    return numerics.dequantize_fp8(*numerics.quantize_fp8_per_token(x), x.dtype)


def _check_nvfp4(x: Tensor, global_scale: Tensor) -> None:
    check_float("fake_quantize_nvfp4", "x", x)
    check_multiple("fake_quantize_nvfp4", "x", x, NVFP4_BLOCK)
    check_scalar("fake_quantize_nvfp4", "global_scale", global_scale)


def _nvfp4(x: Tensor, global_scale: Tensor) -> Tensor:
    g = global_scale.reshape(())
    return numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(x, g), g, x.dtype)


def _nvfp4_largest(global_scale: Tensor) -> Tensor:
    """The largest magnitude that blocks with a global scale reach: 6 * 448 * g."""
    return E2M1_MAX * E4M3_MAX * global_scale.reshape(()).clamp(min=_SMALLEST_GLOBAL_SCALE)


def _check_mxfp8(x: Tensor) -> None:
    check_float("fake_quantize_mxfp8", "x", x)
    check_multiple("fake_quantize_mxfp8", "x", x, MXFP8_BLOCK)


def _mxfp8(x: Tensor) -> Tensor:
    # The quantizer of weights differs in the exponent of a block of zeros alone.
    return numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x), x.dtype)


def _check_fp8_weight(
    weight: Tensor, granularity: str = "tensor", amax: Tensor | None = None
) -> None:
    op = "fake_quantize_fp8_weight"
    _check_matrix(op, weight)
    if granularity not in _GRANULARITIES:
        raise ArgumentError(
            f"mokernels::{op}: granularity is {granularity!r}, wanted one of "
            f"{', '.join(_GRANULARITIES)}."
        )
    if amax is None:
        return
    if granularity == Granularity.CHANNEL.value:
        raise ArgumentError(
            f"mokernels::{op}: an amax was given with granularity {granularity!r}, wanted 'tensor' "
            "or 'block': scales of channels come from the weight. Leave it out."
        )
    check_scalar(op, "amax", amax)


def quantized_fp8_weight(
    weight: Tensor, granularity: str, amax: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes [N, K] of a weight that is not empty, and its scale [], [N] or of 128x128 blocks."""
    if granularity == Granularity.CHANNEL.value:
        return numerics.quantize_fp8_channel_weight(weight)
    shared = None if amax is None else amax.reshape(())
    if granularity == Granularity.TENSOR.value:
        return numerics.quantize_fp8_tensor_weight(weight, shared)
    codes, scale = numerics.quantize_fp8_block_weight(weight, shared)
    return codes, scale[:, 0, :, 0] if scale.dim() == 4 else scale


def _fp8_weight(weight: Tensor, granularity: str = "tensor", amax: Tensor | None = None) -> Tensor:
    if not weight.numel():
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    return numerics.dequantize_fp8(*quantized_fp8_weight(weight, granularity, amax), weight.dtype)


def _check_nvfp4_weight(weight: Tensor, global_scale: Tensor | None = None) -> None:
    op = "fake_quantize_nvfp4_weight"
    _check_matrix(op, weight)
    check_multiple(op, "weight", weight, NVFP4_BLOCK)
    if global_scale is not None:
        check_scalar(op, "global_scale", global_scale)


def _nvfp4_weight(weight: Tensor, global_scale: Tensor | None = None) -> Tensor:
    if not weight.numel():
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    shared = None if global_scale is None else global_scale.reshape(())
    stored = numerics.quantize_nvfp4_weight(weight, shared)
    return numerics.dequantize_nvfp4(*stored, weight.dtype)


def _check_matrix(op: str, weight: Tensor) -> None:
    check_float(op, "weight", weight)
    if weight.dim() != 2:
        raise ArgumentError(f"mokernels::{op}: weight is {describe(weight)}, wanted [N, K].")


def _fake(x: Tensor, *others: object) -> Tensor:
    return x.new_empty(x.shape)


def _register_gradient(name: str, scale_at: int | None, largest: Function | None) -> None:
    """Give ``mokernels::<name>`` the straight-through gradient.

    Args:
        name: the operator; its first argument is x.
        scale_at: position of the argument that may be a given scale, or None.
        largest: from that scale to the largest magnitude that does not saturate.
    """
    count = len(getattr(getattr(torch.ops, NAMESPACE), name).default._schema.arguments)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        scale = None if scale_at is None else inputs[scale_at]
        # x itself, which whatever made it mostly keeps anyway, not a mask of a byte for each value.
        ctx.save_for_backward(*(() if scale is None else (inputs[0], scale)))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.saved_tensors and largest is not None:
            x, scale = ctx.saved_tensors
            # Not `<= largest`: a NaN has to reach the gradient as it has reached the result.
            saturated = x.abs().float() > largest(scale) * _ALLOWANCE
            grad = grad.masked_fill(saturated, 0)
        return (grad, *[None] * (count - 1))

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def _shared_amax(amax: Tensor) -> Tensor:
    return amax.reshape(())


register(
    "fake_quantize_fp8(Tensor x, Tensor scale) -> Tensor",
    check=_check_fp8,
    reference=_fp8,
    fake=_fake,
)
register(
    "fake_quantize_fp8_per_token(Tensor x) -> Tensor",
    check=_check_fp8_per_token,
    reference=_fp8_per_token,
    fake=_fake,
)
register(
    "fake_quantize_nvfp4(Tensor x, Tensor global_scale) -> Tensor",
    check=_check_nvfp4,
    reference=_nvfp4,
    fake=_fake,
)
register(
    "fake_quantize_mxfp8(Tensor x) -> Tensor",
    check=_check_mxfp8,
    reference=_mxfp8,
    fake=_fake,
)
register(
    'fake_quantize_fp8_weight(Tensor weight, str granularity="tensor", Tensor? amax=None) '
    "-> Tensor",
    check=_check_fp8_weight,
    reference=_fp8_weight,
    fake=_fake,
)
register(
    "fake_quantize_nvfp4_weight(Tensor weight, Tensor? global_scale=None) -> Tensor",
    check=_check_nvfp4_weight,
    reference=_nvfp4_weight,
    fake=_fake,
)

_register_gradient("fake_quantize_fp8", 1, _fp8_largest)
_register_gradient("fake_quantize_fp8_per_token", None, None)
_register_gradient("fake_quantize_nvfp4", 1, _nvfp4_largest)
_register_gradient("fake_quantize_mxfp8", None, None)
_register_gradient("fake_quantize_fp8_weight", 2, _shared_amax)
_register_gradient("fake_quantize_nvfp4_weight", 1, _nvfp4_largest)
