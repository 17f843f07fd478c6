"""Layers whose weights accelerate keeps elsewhere and brings in when they are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def resident(layer: nn.Module) -> Iterator[Tensor]:
    """The layer's weight, on a real device for the length of the context."""
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(layer).__name__} has no weight.")
    if not weight.is_meta:
        yield weight
        return
    from accelerate.utils import align_module_device

    with align_module_device(layer):
        yield layer.weight  # type: ignore[misc]


def keep_offloaded(old: nn.Module, new: nn.Module) -> None:
    """Keep a layer's successor in main memory, brought in when it is called, if the layer was."""
    hook = offloading_hook(old)
    if hook is None:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    new.to("cpu")
    stored = {name: parameter.detach() for name, parameter in new.named_parameters()}
    add_hook_to_module(
        new,
        AlignDevicesHook(
            execution_device=hook.execution_device,
            offload=True,
            io_same_device=hook.io_same_device,
            weights_map=stored,
        ),
    )


def offloading_hook(module: nn.Module) -> Any:
    """Accelerate's hook that brings a module's weights in, or None."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        if getattr(part, "offload", False):
            return part
    return None
