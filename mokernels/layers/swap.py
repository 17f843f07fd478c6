"""Putting a quantized layer where a float one was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from mokernels.errors import ArgumentError
from mokernels.formats import Activation, Format
from mokernels.layers.linear import QuantizedLinear, StoredSpec, linear_class


def make_layer(
    linear: nn.Linear,
    format: Format,
    *,
    tensors: Mapping[str, StoredSpec] | None = None,
    activation: Activation | None = None,
    name: str = "",
) -> QuantizedLinear:
    """A quantized layer of the same size, bias and device as ``linear``, its tensors uninitialised.

    Args:
        linear: the layer to replace; its weight may be on the meta device.
        format: how the checkpoint stores the weight.
        tensors: dtype and shape of each stored tensor, by leaf name; ModelOpt's own when None.
        activation: what happens to the input; the format's own treatment when None.
        name: of the layer, for messages.

    Raises:
        ArgumentError: ``linear`` is no ``nn.Linear``, or the sizes do not fit the format.
    """
    if not isinstance(linear, nn.Linear):
        raise ArgumentError(
            f"The layer {name!r} is a {type(linear).__name__}, wanted torch.nn.Linear: only linear "
            f"layers can hold {format.name} weights. Check that the checkpoint is of this model."
        )
    if linear.in_features % format.k_multiple:
        raise ArgumentError(
            f"The layer {name!r} has {linear.in_features} input features, wanted a multiple of "
            f"{format.k_multiple} for {format.name}. Exclude the layer from quantization."
        )
    layer = linear_class(format)(
        format,
        linear.in_features,
        linear.out_features,
        tensors=tensors,
        bias=None if linear.bias is None else linear.bias.dtype,
        activation=activation,
        device=linear.weight.device,
    )
    layer.train(linear.training)
    return layer


def attach_kv_scales(module: nn.Module, tensors: Mapping[str, StoredSpec]) -> None:
    """Give a key or value projection buffers for its KV-cache scales, under the checkpoint's names.

    They are kept so that nothing of the checkpoint is lost; the cache itself stays in the model's
    dtype.
    """
    weight = getattr(module, "weight", None)
    device = weight.device if isinstance(weight, torch.Tensor) else None
    for leaf, spec in tensors.items():
        module.register_buffer(leaf, torch.empty(spec.shape, dtype=spec.dtype, device=device))


def choose_activation(
    format: Format, choice: str, *, has_input_scale: bool = True, beside: Iterable[Format] = ()
) -> Activation:
    """What ``activations=choice`` means for a layer of ``format``.

    Args:
        format: of the layer's weight.
        choice: ``"checkpoint"`` (what the checkpoint asks for), ``"16bit"`` (activations are not
            quantized) or ``"fp8_block"`` (FP8_PB_WO alone: E4M3 in 1x128 blocks, as vLLM does).
        has_input_scale: whether the checkpoint stores calibrated scales; FP8 without them is
            quantized per token.
        beside: formats of the checkpoint's layers, where they differ: a choice that fits some of
            them is made for those, and the others do what the checkpoint asks for.

    Raises:
        ArgumentError: the choice is none of these, or does not fit the format.
    """
    check_activation_choice(choice)
    if choice == "checkpoint":
        static = format.activation is Activation.FP8_STATIC
        return Activation.FP8_PER_TOKEN if static and not has_input_scale else format.activation
    activation = Activation(choice)
    if activation not in format.activations:
        if any(activation in row.activations for row in beside):
            return choose_activation(format, "checkpoint", has_input_scale=has_input_scale)
        raise ArgumentError(
            f"activations={choice!r} does not fit a checkpoint in {format.name}; it is for "
            "FP8_PB_WO alone. Leave it out, or use '16bit'."
        )
    return activation


def check_activation_choice(choice: str) -> None:
    """Raise ArgumentError unless ``choice`` is a value that ``activations=`` can take."""
    if choice not in ACTIVATION_CHOICES:
        raise ArgumentError(
            f"activations={choice!r} is not known, wanted one of "
            f"{', '.join(map(repr, ACTIVATION_CHOICES))}."
        )


ACTIVATION_CHOICES = ("checkpoint", "16bit", "fp8_block")
