"""The distinct products of a checkpoint's linear layers, from its plan; no model is built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mokernels.checkpoint.plan import CheckpointPlan, LayerPlan
from mokernels.formats import Activation, Format
from mokernels.layers import choose_activation
from mokernels.layers.siblings import NAMES


@dataclass(frozen=True)
class Product:
    """Activations [M, K] by a weight [N, K] of a layer, or of layers that share an input.

    Attributes:
        format: of the weight.
        activation: what happens to the activations.
        n: rows of the weight; of all members of a group together.
        k: elements that are summed.
        layers: how many layers, or groups of layers, have this product.
        example: the name of the first of them.
    """

    format: Format
    activation: Activation
    n: int
    k: int
    layers: int = field(default=1, compare=False)
    example: str = field(default="", compare=False)


def products_of(plan: CheckpointPlan, activations: str = "checkpoint") -> tuple[Product, ...]:
    """The products of a checkpoint, each once, in the order of its layers.

    Projections of one input count as the one product that a compiled model makes of them; alone
    they use its configuration too.

    Args:
        plan: what the checkpoint holds.
        activations: as :func:`mokernels.from_pretrained` takes it.

    Raises:
        ArgumentError: ``activations`` is unknown or does not fit the checkpoint's format.
    """
    counts: dict[Product, list[str]] = {}
    for group in _groups(plan.layers):
        first = group[0]
        activation = choose_activation(
            first.format, activations, has_input_scale="input_scale" in first.tensors
        )
        product = Product(first.format, activation, sum(layer.n for layer in group), first.k)
        counts.setdefault(product, []).append(" + ".join(layer.name for layer in group))
    return tuple(
        Product(p.format, p.activation, p.n, p.k, len(names), names[0])
        for p, names in counts.items()
    )


def _groups(layers: Iterable[LayerPlan]) -> Iterator[list[LayerPlan]]:
    """Layers that are planned as one GEMM, as mokernels.layers.link_siblings finds them."""
    parents: dict[str, dict[str, LayerPlan]] = {}
    for layer in layers:
        parent, _, name = layer.name.rpartition(".")
        parents.setdefault(parent, {})[name] = layer
    for children in parents.values():
        left = dict(children)
        for names in NAMES:
            alike: dict[object, list[LayerPlan]] = {}
            for name in names:
                if name in left:
                    alike.setdefault(_likeness(left[name]), []).append(left[name])
            for group in alike.values():
                if len(group) > 1:
                    yield group
                    for layer in group:
                        del left[layer.name.rpartition(".")[2]]
        yield from ([layer] for layer in left.values())


def _likeness(layer: LayerPlan) -> tuple[object, ...]:
    """What members of a group have in common."""
    bias = None if layer.bias is None else layer.bias.dtype
    return layer.format.name, layer.activation, layer.k, bias
