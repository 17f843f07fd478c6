"""How an operator is registered: one function, one library object."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from typing import Any

import torch

from mokernels.errors import MissingDependencyError

NAMESPACE = "mokernels"
TRITON_KEYS = ("CUDA", "XPU")  # HIP tensors dispatch to "CUDA"

# flexible_layout: without it Inductor copies an unrealised producer once for every consumer, so
# an RMSNorm that feeds q, k and v would be computed three times. The launchers take any strides.
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Function = Callable[..., Any]

_REFERENCES: dict[str, Function] = {}


def register(
    schema: str,
    *,
    check: Function,
    reference: Function,
    fake: Function,
    launcher: tuple[str, ...] | None = None,
) -> None:
    """Define ``mokernels::<name>``.

    Args:
        schema: the operator's schema, ``name(arguments) -> returns``.
        check: raises ArgumentError for arguments that do not fit; it takes the operator's arguments
            and runs before every implementation, but for calls on a GPU that are replayed.
        reference: CPU implementation, in plain torch.
        fake: the result's shapes and dtypes only.
        launcher: the Triton implementation: a function's name in ``mokernels.ops.launch``, and what
            it takes before the operator's arguments, which were checked. By default the function of
            the operator's name.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=TAGS)
    _REFERENCES[name] = reference
    LIBRARY.impl(name, _checked(check, reference), "CPU")
    for key in TRITON_KEYS:
        LIBRARY.impl(name, _launcher(check, *(launcher or (name,))), key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", _checked(check, fake), lib=LIBRARY)


def schema_of(name: str, arguments: tuple[str, ...], returns: tuple[str, ...]) -> str:
    """The schema of an operator, from the schemas of its arguments and of its results."""
    results = returns[0] if len(returns) == 1 else f"({', '.join(returns)})"
    return f"{name}({', '.join(arguments)}) -> {results}"


def operator(name: str) -> Function:
    """The overload ``torch.ops.mokernels.<name>.default``."""
    overload: Function = getattr(getattr(torch.ops, NAMESPACE), name).default
    return overload


def reference_of(name: str) -> Function:
    """The implementation of ``mokernels::<name>`` in plain torch, for tracing into a graph."""
    return _REFERENCES[name]


def _checked(check: Function, implementation: Function) -> Function:
    @wraps(implementation)
    def call(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return implementation(*args, **kwargs)

    return call


def _launcher(check: Function, name: str, *leading: str) -> Function:
    """The launcher of this name with its first arguments, imported at its first call."""
    loaded: Function | None = None

    def launch(*args: Any, **kwargs: Any) -> Any:
        nonlocal loaded
        if loaded is None:
            launcher = partial(_import_launcher(name), *leading)
            # What is checked is among what tells remembered calls apart.
            loaded = _replayed(_checked(check, launcher))
        return loaded(*args, **kwargs)

    return launch


def _replayed(call: Function) -> Function:
    replayed: Function = import_module("mokernels.ops.launch.replay").Replayed(call)
    return replayed


def _import_launcher(name: str) -> Function:
    try:
        launcher: Function = getattr(import_module("mokernels.ops.launch"), name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise MissingDependencyError(
            f"mokernels::{name} needs Triton on this device, and triton is not installed. "
            "Install triton >= 3.6, or move the tensors to the CPU."
        ) from error
    return launcher
