"""What a compiled decoder layer is given, so that one graph serves all layers and all lengths.

A layer reads its own entry of the cache by its index, a Python number by which Dynamo would
specialise: a graph for each layer. So the layer gets a view of the cache in which its own entry is
the only one. Sizes that change from call to call (rows of the batch, tokens) are marked before the
first compilation, which otherwise would be wasted on the sizes that happened to come first.

Nothing of transformers is imported; its caches are recognised by what they offer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Dimensions of the batch and of the tokens, from the end: models pass these with and without a
# batch, or with a dimension in front of it.
_BATCH_AND_TOKENS: Mapping[str, tuple[int, ...]] = {
    "attention_mask": (-4, -2),
    "position_ids": (-2, -1),
    "position_embeddings": (-3, -2),
    "cos": (-3, -2),
    "sin": (-3, -2),
}


class LayerCache:
    """A cache as one decoder layer sees it: whatever index the layer names, it is its own entry.

    Args:
        cache: of a whole model; everything that is not listed here is asked of it.
        layer: the entry.
    """

    def __init__(self, cache: Any, layer: Any) -> None:
        self.cache = cache
        self.layer = layer

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: object = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Append keys and values [B, H, M, D]; returns all that there are."""
        return self.layer.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask before __init__ has run.
        if name in ("cache", "layer"):
            raise AttributeError(name)
        return getattr(self.cache, name)


def layer_index(layer: nn.Module) -> int | None:
    """The number by which a decoder layer finds its entry of a cache; None if it has none."""
    found = {getattr(module, "layer_idx", None) for module in layer.modules()} - {None}
    index = found.pop() if len(found) == 1 else None
    return index if isinstance(index, int) else None


def own_entry(cache: Any, index: int) -> Any:
    """A cache's entry for one layer, or None for anything that is no cache with such an entry."""
    entries = getattr(cache, "layers", None)
    # An offloading cache moves its neighbours too: those layers need the whole of it.
    if not isinstance(entries, list) or getattr(cache, "offloading", False):
        return None
    if not callable(getattr(cache, "update", None)) or index >= len(entries):
        return None
    return entries[index] if callable(getattr(entries[index], "update", None)) else None


def hidden_states(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The activations [B, M, H] among a decoder layer's arguments."""
    first = args[0] if args else kwargs.get("hidden_states")
    return first if isinstance(first, Tensor) and first.dim() == 3 else None


def mark_changing_sizes(hidden: Tensor, kwargs: Mapping[str, Any], entries: Sequence[Any]) -> None:
    """Tell Dynamo which sizes change from call to call; sizes of 1 are left to be special.

    Args:
        hidden: [B, M, H].
        kwargs: the layer's other arguments, by the names that transformers gives them.
        entries: of caches, with keys and values [B, ...].
    """
    _mark(hidden, (-3, -2))
    for name, dims in _BATCH_AND_TOKENS.items():
        given = kwargs.get(name)
        for tensor in given if isinstance(given, tuple) else (given,):
            _mark(tensor, dims)
    for entry in entries:
        for tensor in (getattr(entry, "keys", None), getattr(entry, "values", None)):
            _mark(tensor, (-4,))


def _mark(tensor: Any, dims: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        return
    for dim in dims:
        if tensor.dim() >= -dim and tensor.shape[dim] > 1:
            torch._dynamo.maybe_mark_dynamic(tensor, tensor.dim() + dim)
