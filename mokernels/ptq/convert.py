"""From float layers with known amax to quantized layers that run the real kernels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mokernels.checkpoint.weights import quantize_weight
from mokernels.formats import E2M1_MAX, E4M3_MAX, FP8_BLOCK, Activation, Format, Granularity
from mokernels.layers import QuantizedLinear, StoredSpec, make_layer
from mokernels.layers.siblings import NAMES
from mokernels.numerics.elements import divide
from mokernels.numerics.noise import SignalToNoise
from mokernels.ptq.offload import keep_offloaded, resident

_EXPERT = re.compile(r"(^|\.)experts\.\d+\.")
_DIVISORS: Mapping[Activation, float] = {
    Activation.FP8_STATIC: E4M3_MAX,
    Activation.NVFP4: E2M1_MAX * E4M3_MAX,
}
"""input_scale = amax / divisor, for the activations that are calibrated."""


def is_calibrated(format: Format) -> bool:
    """Whether layers of a format store a scale of their activations."""
    return format.activation in _DIVISORS


def input_scale(format: Format, amax: float) -> Tensor:
    """The stored activation scale of an amax, fp32 [].

    An amax of 0 (only zeros were seen) counts as 448 for FP8 and 6 for NVFP4, as in ModelOpt.
    """
    largest = E2M1_MAX if format.activation is Activation.NVFP4 else E4M3_MAX
    return divide(torch.tensor(amax or largest), _DIVISORS[format.activation])


def convert_layers(
    model: nn.Module,
    chosen: Mapping[str, Format],
    amax: Mapping[str, float],
    groups: Sequence[Sequence[str]],
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, float]:
    """Replace layers in place, one after the other.

    Args:
        model: whose layers are replaced.
        chosen: format by name, in the order to go by.
        amax: of the inputs, by name, for the formats that need it.
        groups: names of layers that share an input; see :func:`fused_groups`.
        progress: called with the number of layers done and their total.

    Returns:
        Signal to quantization noise of each weight in dB, by name; infinite where it is exact.
    """
    noise: dict[str, float] = {}
    scales: dict[tuple[str, ...], Tensor] = {}
    for done, (name, row, group) in enumerate(grouped(chosen, groups), start=1):
        if group not in scales and shares_weight_scale(model, row, group):
            scales[group] = _largest_amax(model, group)
        scale = input_scale_of(row, amax, group)
        noise[name] = replace_layer(model, name, row, scale, scales.get(group))
        if progress is not None:
            progress(done, len(chosen))
    return noise


def grouped(
    chosen: Mapping[str, Format], groups: Sequence[Sequence[str]]
) -> Iterator[tuple[str, Format, tuple[str, ...]]]:
    """Every layer, its format, and the layers of that format with its input, itself among them."""
    shared = {name: tuple(group) for group in groups for name in group}
    for name, row in chosen.items():
        group = shared.get(name, (name,))
        yield name, row, tuple(other for other in group if chosen.get(other) is row)


def input_scale_of(row: Format, amax: Mapping[str, float], group: Sequence[str]) -> Tensor | None:
    """The activation scale that layers with one input share, fp32 []; None without calibration."""
    largest = max((amax[name] for name in group if name in amax), default=None)
    return input_scale(row, largest) if is_calibrated(row) and largest is not None else None


def fused_groups(chosen: Mapping[str, Format]) -> list[tuple[str, ...]]:
    """Layers that share an input going by their names: q/k/v and gate/up, two or more each."""
    groups = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in chosen):
        for names in NAMES:
            children = [f"{parent}.{name}" if parent else name for name in names]
            present = tuple(child for child in children if child in chosen)
            if len(present) > 1:
                groups.append(present)
    return groups


def replace_layer(
    model: nn.Module, name: str, row: Format, scale: Tensor | None, weight_amax: Tensor | None
) -> float:
    """Replace one layer in place.

    Args:
        model: that holds the layer.
        name: of the layer.
        row: its format.
        scale: the stored scale of its activations, fp32 [], or None.
        weight_amax: of all weights that share a scale with its own, fp32 [], or None.

    Returns:
        Signal to quantization noise of the weight in dB.
    """
    linear = model.get_submodule(name)
    scales: dict[str, Any] = {} if scale is None else {"input_scale": scale}
    with resident(linear) as weight:
        if weight_amax is not None:
            key = "weight_scale_2" if row.second_scale else "weight_amax"
            largest = weight_amax.to(weight.device)
            scales[key] = divide(largest, E2M1_MAX * E4M3_MAX) if row.second_scale else largest
        stored = quantize_weight(row, weight, **scales)
        layer = _layer(linear, row, stored, name, weight.device)
        noise = SignalToNoise().add(weight.detach(), layer.dequantized_weight()).decibels
    keep_offloaded(linear, layer)
    model.set_submodule(name, layer)
    return noise


def _layer(
    linear: nn.Module,
    row: Format,
    stored: Mapping[str, Tensor],
    name: str,
    device: torch.device,
) -> QuantizedLinear:
    specs = {leaf: StoredSpec(tensor.dtype, tuple(tensor.shape)) for leaf, tensor in stored.items()}
    static = row.activation is Activation.FP8_STATIC and "input_scale" not in stored
    activation = Activation.FP8_PER_TOKEN if static else None
    layer = make_layer(linear, row, tensors=specs, activation=activation, name=name)
    if next(layer.parameters()).is_meta:
        layer.to_empty(device=device)
    with torch.no_grad():
        for leaf, tensor in stored.items():
            getattr(layer, leaf).copy_(tensor)
        bias = getattr(linear, "bias", None)
        if bias is not None and layer.bias is not None and not bias.is_meta:
            layer.bias.copy_(bias)
    layer.requires_grad_(False)
    layer.refresh()
    return layer


def shares_weight_scale(model: nn.Module, row: Format, group: Sequence[str]) -> bool:
    """Whether layers of a model with one input get one weight scale; see :func:`one_scale`."""
    return len(group) > 1 and one_scale(row, model.get_submodule(group[0]).weight.shape, group[0])


def one_scale(row: Format, first: Sequence[int], name: str) -> bool:
    """Whether ModelOpt's export gives layers with one input one weight scale, too.

    It does where the weight's amax is one number: in NVFP4, in FP8_PB_WO when the first of the
    group fits one block, and in FP8 for experts alone, whose gate and up it takes for one weight.

    Args:
        row: format of the layers.
        first: shape of the first layer's weight.
        name: of that layer.
    """
    if row.second_scale:
        return True
    expert = _EXPERT.search(name) is not None
    if row.granularity is Granularity.BLOCK:
        return max(first[0] * (1 + expert), first[1]) <= FP8_BLOCK
    return row.granularity is Granularity.TENSOR and expert


def _largest_amax(model: nn.Module, group: Sequence[str]) -> Tensor:
    found = []
    for name in group:
        with resident(model.get_submodule(name)) as weight:
            found.append(weight.detach().abs().amax().float().cpu())
    return torch.stack(found).amax()
