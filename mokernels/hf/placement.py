"""Models whose parts are on several devices, or offloaded: saving them, and loading one alike."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mokernels.hf.load import from_pretrained
from mokernels.ptq.offload import offloading_hook


def input_device(model: Any) -> torch.device:
    """Where the model's inputs belong: not on "meta", where offloaded weights seem to be."""
    device: torch.device = model.device
    if device.type != "meta":
        return device
    hooks = (offloading_hook(module) for module in model.modules())
    found = next((hook.execution_device for hook in hooks if hook is not None), "cpu")
    return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)


@contextmanager
def savable(model: nn.Module) -> Iterator[None]:
    """Let ``save_pretrained`` see that weights are offloaded.

    It looks at ``hf_device_map`` alone, which accelerate's cpu_offload and disk_offload do not set,
    and would fail at the first weight that seems to be on "meta".
    """
    unknown = not hasattr(model, "hf_device_map") and is_offloaded(model)
    if unknown:
        model.hf_device_map = {"": "cpu"}  # type: ignore[assignment]
    try:
        yield
    finally:
        if unknown:
            del model.hf_device_map


def is_offloaded(model: nn.Module) -> bool:
    """Whether some of its weights are brought in when they are needed."""
    return any(parameter.is_meta for parameter in model.parameters())


def load_alike(model: Any, folder: str | os.PathLike[str], scratch: str | os.PathLike[str]) -> Any:
    """Load a checkpoint with its parts where those of ``model`` are, and in its dtype.

    Args:
        model: of transformers, which may not fit into one device's memory.
        folder: of the checkpoint.
        scratch: a folder for what is offloaded to disk.
    """
    device_map = getattr(model, "hf_device_map", None) or {}
    if len(device_map) > 1:
        placed: dict[str, Any] = {"device_map": dict(device_map)}
        if "disk" in device_map.values():
            placed["offload_folder"] = scratch
        return from_pretrained(folder, dtype=model.dtype, **placed)
    if not is_offloaded(model):
        return from_pretrained(folder, dtype=model.dtype, device_map=str(model.device))
    from accelerate import cpu_offload

    loaded = from_pretrained(folder, dtype=model.dtype, device_map="cpu")
    return cpu_offload(loaded, execution_device=input_device(model))
