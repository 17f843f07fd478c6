"""Fake-quantized layers for training, and from those to the packed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from mokernels.errors import ArgumentError
from mokernels.formats import Format
from mokernels.layers.trainable import FakeQuantizedLinear, SharedWeightScale
from mokernels.ptq.convert import grouped, input_scale_of, replace_layer, shares_weight_scale

Advance = Callable[[int, int | None], None]


def check_resident(model: nn.Module, chosen: Mapping[str, Format]) -> None:
    """Refuse layers whose weights are kept elsewhere: no optimizer could change them.

    Raises:
        ArgumentError: a weight is on the meta device.
    """
    for name in chosen:
        if model.get_submodule(name).weight.is_meta:
            raise ArgumentError(
                f"The weight of the layer {name!r} is offloaded, and trainable=True trains weights "
                "in memory. Load the model without offloading, or quantize without trainable=True "
                "and train adapters."
            )


def fake_quantize_layers(
    model: nn.Module,
    chosen: Mapping[str, Format],
    amax: Mapping[str, float],
    groups: Sequence[Sequence[str]],
    progress: Advance | None = None,
) -> dict[str, float]:
    """Replace layers in place by fake-quantized ones that hold the same parameters.

    The arguments are those of :func:`mokernels.ptq.convert.convert_layers`; so is the result,
    which has nothing in it: the noise of weights that will change is measured when they are packed.
    """
    sharing: dict[tuple[str, ...], None] = {}
    for done, (name, row, group) in enumerate(grouped(chosen, groups), start=1):
        if shares_weight_scale(model, row, group):
            sharing[group] = None
        layer = FakeQuantizedLinear(
            model.get_submodule(name),  # type: ignore[arg-type]
            row,
            input_scale_of(row, amax, group),
        )
        model.set_submodule(name, layer)
        if progress is not None:
            progress(done, len(chosen))
    for group in sharing:
        SharedWeightScale(model.get_submodule(name) for name in group)  # type: ignore[misc]
    return {}


def is_trainable(model: nn.Module) -> bool:
    """Whether a model holds fake-quantized layers."""
    return any(isinstance(module, FakeQuantizedLinear) for module in model.modules())


def pack_layers(
    model: nn.Module, chosen: Mapping[str, Format], progress: Advance | None = None
) -> dict[str, float]:
    """Replace fake-quantized layers in place by packed ones with the current weights.

    Args:
        model: whose layers of these names are fake-quantized.
        chosen: format by name.
        progress: called with the number of layers done and their total.

    Returns:
        Signal to quantization noise of each weight in dB, by name; infinite where it is exact.

    Raises:
        ArgumentError: a layer of these names is no fake-quantized one (any more); nothing changed.
    """
    modules = dict(model.named_modules())
    for name in chosen:
        found = modules.get(name)
        if not isinstance(found, FakeQuantizedLinear):
            kind = "missing" if found is None else f"a {type(found).__name__}"
            raise ArgumentError(
                f"The layer {name!r} cannot be packed: it is {kind}, wanted the fake-quantized "
                "layer that quantize(..., trainable=True) put there. If adapters wrap it, merge "
                "them first (PEFT: merge_and_unload) and give the model that this returns."
            )
    del modules
    noise = {}
    for done, (name, row) in enumerate(chosen.items(), start=1):
        old: FakeQuantizedLinear = model.get_submodule(name)  # type: ignore[assignment]
        noise[name] = replace_layer(model, name, row, old.input_scale, old.shared_amax())
        _keep_buffers(old, model.get_submodule(name))
        if progress is not None:
            progress(done, len(chosen))
    return noise


def _keep_buffers(old: nn.Module, new: nn.Module) -> None:
    """Scales of the KV cache, which belong to no format of weights."""
    for leaf, buffer in old._buffers.items():
        if isinstance(buffer, torch.Tensor) and leaf != "input_scale":
            new.register_buffer(leaf, buffer)
