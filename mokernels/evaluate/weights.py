"""Weights of two checkpoints, layer by layer: neither model is ever whole in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mokernels.checkpoint import Checkpoint, CheckpointPlan, audit, open_checkpoint
from mokernels.checkpoint.dequantize import dequantized_weight
from mokernels.checkpoint.plan import join
from mokernels.errors import ArgumentError, CheckpointError
from mokernels.numerics.noise import SignalToNoise

_SHOWN = 4


@dataclass(frozen=True)
class LayerError:
    """How far a weight of the second checkpoint is from the first's.

    Attributes:
        name: of the layer.
        formats: how each of the two stores the weight: a format of ModelOpt or a dtype.
        shape: (N, K).
        sqnr: 10 log10(sum of a^2 / sum of (a - b)^2), in dB; infinite where they are equal.
    """

    name: str
    formats: tuple[str, str]
    shape: tuple[int, int]
    sqnr: float


@dataclass(frozen=True)
class WeightErrors:
    """All weights of two checkpoints.

    Attributes:
        layers: those that at least one of the two quantizes.
        others: number of the other tensors.
        differing: names of those among them that are not equal.
    """

    layers: tuple[LayerError, ...]
    others: int
    differing: tuple[str, ...]


class Side:
    """One of the two checkpoints, opened and audited."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        report = audit(checkpoint, values="scales")
        if report.errors:
            raise CheckpointError(checkpoint.path, report.errors)
        self.checkpoint = checkpoint
        self.plan: CheckpointPlan = report.plan
        self.layers = {layer.name: layer for layer in self.plan.layers}
        self.plain = frozenset(self.plan.plain) | {
            join(layer.name, "bias") for layer in self.plan.layers if layer.bias
        }

    def holds(self, layer: str) -> bool:
        """Whether there is a weight of that name."""
        return layer in self.layers or self.stored_name(layer) is not None

    def stored_name(self, layer: str) -> str | None:
        """Name of the plain tensor that is a layer's weight; the embedding's for a tied output."""
        name = join(layer, "weight")
        if name in self.plain:
            return name
        if layer.rpartition(".")[2] != "lm_head":
            return None
        return next((key for key in self.plain if key.endswith("embed_tokens.weight")), None)

    def format(self, layer: str) -> str:
        """How the weight is stored."""
        if layer in self.layers:
            return self.layers[layer].format.name
        info = self.checkpoint.tensors[self.stored_name(layer) or ""]
        return str(info.dtype).removeprefix("torch.")

    def weight(self, layer: str) -> Tensor:
        """The weight [N, K], fp32."""
        if layer in self.layers:
            return dequantized_weight(self.checkpoint, self.layers[layer])
        return self.checkpoint.tensor(self.stored_name(layer) or "").float()


def compare_weights(
    a: Path, b: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> WeightErrors:
    """Compare the weights of two folders, in fp32 as codes and scales say.

    Args:
        a: the reference.
        b: compared with it.
        progress: called with the number of tensors done and of all.

    Raises:
        CheckpointError: one of them is broken.
        ArgumentError: they do not hold the same tensors.
    """
    with open_checkpoint(a) as first, open_checkpoint(b) as second:
        sides = Side(first), Side(second)
        names = list(dict.fromkeys(name for side in sides for name in side.layers))
        others = _common(sides, names)
        total = len(names) + len(others)
        layers = []
        for done, name in enumerate(names, start=1):
            layers.append(_layer_error(sides, name))
            progress(done, total)
        differing = []
        for done, name in enumerate(others, start=len(names) + 1):
            if not _equal(first, second, name):
                differing.append(name)
            progress(done, total)
    return WeightErrors(tuple(layers), len(others), tuple(differing))


def _layer_error(sides: tuple[Side, Side], name: str) -> LayerError:
    reference, other = (side.weight(name) for side in sides)
    if reference.shape != other.shape:
        raise _different(sides, f"the layer {name!r} is {_sizes(reference)} and {_sizes(other)}")
    n, k = reference.shape
    formats = sides[0].format(name), sides[1].format(name)
    return LayerError(name, formats, (n, k), SignalToNoise().add(reference, other).decibels)


def _common(sides: tuple[Side, Side], layers: list[str]) -> list[str]:
    """Names of the tensors that neither side quantizes; all have to be on both sides."""
    weights = {join(layer, "weight") for layer in layers}
    missing = [layer for layer in layers if not all(side.holds(layer) for side in sides)]
    missing += sorted((sides[0].plain ^ sides[1].plain) - weights - _tied(sides))
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        names = ", ".join(map(repr, missing[:_SHOWN]))
        raise _different(sides, f"only one of them holds {names}{more}")
    return sorted((sides[0].plain & sides[1].plain) - weights)


def _tied(sides: tuple[Side, Side]) -> set[str]:
    """The output layer's weight where one side alone stores it, and the other ties it."""
    names = {name for side in sides for name in side.plain if name.endswith("lm_head.weight")}
    layers = {name: name.removesuffix(".weight") for name in names}
    return {name for name in names if all(side.holds(layers[name]) for side in sides)}


def _equal(a: Checkpoint, b: Checkpoint, name: str) -> bool:
    one, other = a.tensors[name], b.tensors[name]
    if one.shape != other.shape:
        raise ArgumentError(
            f"{str(a.path)!r} and {str(b.path)!r} are not of the same model: the tensor {name!r} "
            f"is {list(one.shape)} and {list(other.shape)}. Compare a model with its own "
            "quantization."
        )
    if one.dtype != other.dtype:
        return bool(torch.equal(a.tensor(name).double(), b.tensor(name).double()))
    pairs = zip(a.chunks(name), b.chunks(name), strict=True)
    return all(torch.equal(left, right) for (_, left), (_, right) in pairs)


def _sizes(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))


def _different(sides: tuple[Side, Side], what: str) -> ArgumentError:
    a, b = (str(side.checkpoint.path) for side in sides)
    return ArgumentError(
        f"{a!r} and {b!r} are not of the same model: {what}. Compare a model with its own "
        "quantization."
    )
