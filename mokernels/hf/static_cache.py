"""A static key and value cache that is kept from one generation to the next.

Compiled layers and CUDA graphs refer to a cache by its address and its length. So generations of
the same size share one, and the lengths are rounded up to few.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any

import torch
from transformers import GenerationMixin, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

SHORTEST = 256
"""Tokens of the shortest cache."""

CACHE_NAME = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
"""The argument by which this version of transformers passes a cache."""


def rounded_length(tokens: int, longest: int | None) -> int:
    """Length of the cache for ``tokens``: the next power of two, at least :data:`SHORTEST`.

    Args:
        tokens: at most so many are to be stored.
        longest: positions that the model knows, if it says so; rounding does not go beyond.
    """
    rounded = max(SHORTEST, 1 << max(tokens - 1, 0).bit_length())
    return max(tokens, min(rounded, longest or rounded))


def unsupported_layers(cache: StaticCache) -> set[str]:
    """Kinds of the cache's layers whose state :class:`KeptCache` does not know."""
    known = (StaticLayer, StaticSlidingWindowLayer)
    return {type(layer).__name__ for layer in cache.layers if type(layer) not in known}


class KeptCache:
    """A :class:`transformers.StaticCache` whose tensors stay where they are.

    Args:
        model: a decoder; one token is run through it, since its layers alone know their shapes.
        rows: of the batch.
        length: tokens that fit.

    Attributes:
        cache: what the model is given.
        rows, length: as given.
    """

    def __init__(self, model: Any, rows: int, length: int) -> None:
        self.cache = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=length)
        self.rows, self.length = rows, length
        token = torch.zeros((rows, 1), dtype=torch.long, device=model.device)
        with torch.compiler.set_stance("force_eager"):
            model(input_ids=token, use_cache=True, **{CACHE_NAME: self.cache})
        self.cache.reset()

    @property
    def sliding(self) -> list[StaticSlidingWindowLayer]:
        """Entries that hold a window; they count their tokens in Python too."""
        return [e for e in self.cache.layers if isinstance(e, StaticSlidingWindowLayer)]

    def mode(self) -> Hashable:
        """What a step of one token does to each window: fill it, or move it."""
        return tuple(e.cumulative_length_int >= e.max_cache_len for e in self.sliding)

    def rewinder(self) -> Callable[[], None]:
        """A function that undoes steps of one token that are done after this is called."""
        tensors = [entry.cumulative_length for entry in self.cache.layers]
        counts = [(entry, entry.cumulative_length_int) for entry in self.sliding]
        # Elsewhere a step overwrites only the place that the next one will overwrite again.
        full = [e for e in self.sliding if e.cumulative_length_int >= e.max_cache_len]
        tensors += [tensor for entry in full for tensor in (entry.keys, entry.values)]
        saved = [tensor.clone() for tensor in tensors]

        def rewind() -> None:
            for tensor, before in zip(tensors, saved, strict=True):
                tensor.copy_(before)
            for entry, count in counts:
                entry.cumulative_length_int = count

        return rewind

    def count_step(self) -> None:
        """Count a token in Python, where a replayed step does not."""
        for entry in self.sliding:
            entry.cumulative_length_int += 1
