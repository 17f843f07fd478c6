"""Linear layers whose float weight is trained as the quantized layer will see it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as multiply

from mokernels.errors import ArgumentError
from mokernels.formats import E2M1_MAX, E4M3_MAX, Activation, Format
from mokernels.numerics.elements import divide
from mokernels.ops.registry import operator


class FakeQuantizedLinear(nn.Linear):
    """A linear layer that rounds its weight and its input to a format's values in every call.

    The gradient goes straight through the rounding; see :mod:`mokernels.ops.fake_quantize`. The
    scales of the weight follow the weight, that of the input stays the calibrated one. In an fp32
    model both operands have the bits that the packed layer multiplies; in bf16 and fp16 each
    value is rounded to that dtype once more, before the product.

    Args:
        linear: the layer to replace, in memory; its parameters are taken over, not copied.
        format: whose values the operands are rounded to.
        input_scale: fp32 [], the calibrated scale of the activations, where the format has one;
            FP8 without it quantizes them per token.

    Attributes:
        shared: the layers whose weights share a scale with this one's, or None.

    Raises:
        ArgumentError: the format has activations that cannot be trained with, or needs a scale.
    """

    def __init__(
        self, linear: nn.Linear, format: Format, input_scale: Tensor | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.format = format
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("weight", linear.weight)
        self.register_parameter("bias", linear.bias)
        scale = None if input_scale is None else input_scale.detach().reshape(()).clone()
        self.register_buffer("input_scale", None if scale is None else scale.to(self.weight.device))
        self.activation = _activation(format, input_scale)
        self.shared: SharedWeightScale | None = None
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N] in the dtype of the input."""
        return multiply(self._fake_quantized(input), self.fake_quantized_weight(), self.bias)

    def fake_quantized_weight(self) -> Tensor:
        """The values [N, K] that an export would store now, in the weight's dtype."""
        amax = self.shared_amax()
        if self.format.second_scale:
            scale = None if amax is None else divide(amax, E2M1_MAX * E4M3_MAX)
            return _NVFP4_WEIGHT(self.weight, scale)  # type: ignore[no-any-return]
        if self.format.scale_dtype == torch.uint8:
            return _MXFP8(self.weight)  # type: ignore[no-any-return]
        return _FP8_WEIGHT(self.weight, self.format.granularity.value, amax)  # type: ignore[no-any-return]

    def shared_amax(self) -> Tensor | None:
        """The largest magnitude in the weights that share a scale, fp32 []; None if none does."""
        return None if self.shared is None else self.shared.amax()

    def _fake_quantized(self, x: Tensor) -> Tensor:
        if self.activation is Activation.NONE:
            return x
        scale = () if self.input_scale is None else (self.input_scale,)
        return _ACTIVATIONS[self.activation](x, *scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantizedLinear:
        """Moves are obeyed; casts to another dtype reach the parameters, never the scales."""
        scales = {id(buffer) for buffer in self._buffers.values() if buffer is not None}

        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if id(tensor) in scales and result.dtype != tensor.dtype:
                return tensor.to(result.device)
            return result

        super()._apply(keep_dtype, recurse)
        return self

    def extra_repr(self) -> str:
        """Format and activations after nn.Linear's own numbers."""
        activations = self.activation.value
        return f"{super().extra_repr()}, format={self.format.name}, activations={activations}"


class SharedWeightScale:
    """Layers with one input whose weights share a scale, as they do when served: q/k/v, gate/up.

    Not a module, so that no layer holds its neighbours' parameters as its own.

    Args:
        members: two or more.
    """

    def __init__(self, members: Iterable[FakeQuantizedLinear]) -> None:
        self.members = tuple(members)
        for member in self.members:
            member.shared = self

    def amax(self) -> Tensor:
        """The largest magnitude in all weights, fp32 []."""
        found = [member.weight.detach().abs().amax().float() for member in self.members]
        return torch.stack(found).amax()


def _activation(format: Format, input_scale: Tensor | None) -> Activation:
    chosen = format.activation
    if chosen is Activation.FP8_STATIC and input_scale is None:
        chosen = Activation.FP8_PER_TOKEN
    if chosen is not Activation.NONE and chosen not in _ACTIVATIONS:
        raise ArgumentError(
            f"{format.name} quantizes activations as {chosen.value!r}, with which this version "
            "does not train. Choose another format, or quantize without trainable=True."
        )
    if chosen is Activation.NVFP4 and input_scale is None:
        raise ArgumentError(
            f"A fake-quantized layer in {format.name} needs a calibrated input_scale, the "
            "activations' amax / 2688. Calibrate the model, or choose a format without calibration."
        )
    return chosen


_FP8_WEIGHT = operator("fake_quantize_fp8_weight")
_NVFP4_WEIGHT = operator("fake_quantize_nvfp4_weight")
_MXFP8 = operator("fake_quantize_mxfp8")
_ACTIVATIONS: dict[Activation, Callable[..., Tensor]] = {
    Activation.FP8_STATIC: operator("fake_quantize_fp8"),
    Activation.FP8_PER_TOKEN: operator("fake_quantize_fp8_per_token"),
    Activation.NVFP4: operator("fake_quantize_nvfp4"),
    Activation.MXFP8: _MXFP8,
}
