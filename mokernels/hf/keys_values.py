"""Observing the keys and values that attention gets, as a KV cache would hold them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mokernels.calibration.observers import AmaxObserver


@contextmanager
def watch_keys_and_values(
    model: nn.Module, observers: Mapping[str, AmaxObserver]
) -> Iterator[None]:
    """A context in which the model's attention tells what it gets.

    The keys are those after the rotary embedding, as ModelOpt calibrates them.

    Args:
        model: of transformers, with attention functions that can be exchanged.
        observers: by the name of the projection that makes the keys or values.
    """
    places = {id(module): name for name, module in model.named_modules()}
    implementations = {
        str(module.config._attn_implementation)
        for module in model.modules()
        if getattr(getattr(module, "config", None), "_attn_implementation", None)
    }

    def observed(name: str) -> Callable[..., Any]:
        original = ALL_ATTENTION_FUNCTIONS.get(name)

        def attend(
            module: nn.Module, query: Any, key: Any, value: Any, *args: Any, **options: Any
        ) -> Any:
            place = places.get(id(module), "")
            for leaf, states in (("k_proj", key), ("v_proj", value)):
                observer = observers.get(f"{place}.{leaf}" if place else leaf)
                if observer is not None:
                    observer.observe(states)
            run = original or sys.modules[type(module).__module__].eager_attention_forward
            return run(module, query, key, value, *args, **options)

        return attend

    replaced = {name: observed(name) for name in implementations}
    for name, function in replaced.items():
        ALL_ATTENTION_FUNCTIONS[name] = function
    try:
        yield
    finally:
        for name in replaced:
            # What transformers has of that name for all models comes to light again.
            del ALL_ATTENTION_FUNCTIONS[name]
