"""Putting a quantized layer where a float one was."""

from __future__ import annotations

from collections.abc import Mapping

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
