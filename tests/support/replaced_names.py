"""Private names of PyTorch that tests replace, and what PyTorch remembers of a device."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from mokernels.ops.target import target_of

Replacement = tuple[Any, str, Any]
"""An object or its full name, the attribute's name, and what to put there."""

_CACHING_MODULES = (
    "torch._inductor.codecache",
    "torch._inductor.codegen",
    "torch._inductor.runtime",
    "torch._inductor.utils",
    "torch.utils._triton",
)
"""Packages whose cached functions answer questions about the device."""


def owner_of(owner: Any) -> Any:
    """A module or class by its full name, None if there is none; anything else as it is."""
    if not isinstance(owner, str):
        return owner
    try:
        return import_module(owner)
    except ModuleNotFoundError:
        module, _, name = owner.rpartition(".")
        return getattr(import_module(module), name, None)


def require(replacements: Sequence[Replacement]) -> None:
    """Raise RuntimeError if there is nothing to replace."""
    missing = [
        f"{owner if isinstance(owner, str) else type(owner).__name__}.{name}"
        for owner, name, _ in replacements
        if not hasattr(owner_of(owner), name)
    ]
    if missing:
        raise RuntimeError(
            f"PyTorch {torch.__version__} lacks {', '.join(missing)}, which tests/support/"
            "fakecuda.py replaces to compile for a device that is not there: adjust it"
        )


def clear_caches() -> None:
    """Forget answers about the device: mokernels', Dynamo's, and those of Inductor's functions."""
    target_of.cache_clear()
    torch._dynamo.reset()
    for name, module in list(sys.modules.items()):
        if name.startswith(_CACHING_MODULES) and module is not None:
            for value in list(vars(module).values()):
                _clear_cached(value)
                if isinstance(value, type) and value.__module__ == name:
                    for member in list(vars(value).values()):
                        _clear_cached(member)


def _clear_cached(function: Any) -> None:
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    if isinstance(function, functools._lru_cache_wrapper):
        function.cache_clear()
