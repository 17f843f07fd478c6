"""Compile a model by its repeated layers: the time does not grow with their number.

``layer.compile()`` on every layer nearly does this, but all modules of a process then share one
entry in Dynamo's tables (the code of ``nn.Module._call_impl``): its limit of recompilations, and
what it learns about sizes, would be shared by all models. Here each model has entry points of its
own, and layers get their inputs as :mod:`mokernels.compile.layer_inputs` prepares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from mokernels.compile.layer_inputs import (
    LayerCache,
    hidden_states,
    layer_index,
    mark_changing_sizes,
    own_entry,
)
from mokernels.compile.options import split_options


@dataclass(frozen=True)
class HowToCompile:
    """Arguments of ``torch.compile``, as one value."""

    backend: str = "inductor"
    mode: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    fullgraph: bool = True
    dynamic: bool | None = None

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, to be compiled when it is called."""
        made: Callable[..., Any] = torch.compile(
            function,
            backend=self.backend,
            mode=self.mode,
            options=dict(self.options) or None,
            fullgraph=self.fullgraph,
            dynamic=self.dynamic,
        )
        return made


class Regions:
    """The compiled entry points of one model's layers; they outlast being taken off the layers.

    It refers to the layers only by their classes, so that it can be kept beside a model.

    Args:
        how: arguments of ``torch.compile``.
    """

    def __init__(self, how: HowToCompile) -> None:
        self.how = how
        self._name = uuid4().hex[:8]
        self._entries: dict[tuple[object, ...], Callable[..., Any]] = {}
        how.compiled(_call_layer)  # modes and options that do not exist are refused here

    def attach(self, model: nn.Module) -> None:
        """Let the model's layers run compiled."""
        for layer in regions_of(model):
            layer._compiled_call_impl = CompiledLayer(layer, self)

    def entry(self, kind: tuple[object, ...]) -> Callable[..., Any]:
        """The compiled function of (layer, args, kwargs) for one kind of layer and of inputs."""
        if kind not in self._entries:
            # Dynamo counts compilations and remembers sizes by a code object and its name.
            name = f"decoder_layer_{self._name}_{len(self._entries)}"
            code = _call_layer.__code__.replace(co_name=name, co_qualname=name)
            self._entries[kind] = self.how.compiled(FunctionType(code, globals(), name))
        return self._entries[kind]


class CompiledLayer:
    """What a layer runs in place of its own forward and hooks.

    Args:
        layer: a module.
        regions: whose entry points it runs.
    """

    def __init__(self, layer: nn.Module, regions: Regions) -> None:
        self.layer = layer
        self.regions = regions
        self._index = layer_index(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's result."""
        entries = []
        if self._index is not None:
            for name, value in kwargs.items():
                entry = own_entry(value, self._index)
                if entry is not None:
                    kwargs[name] = LayerCache(value, entry)
                    entries.append(entry)
        hidden = hidden_states(args, kwargs)
        kind: list[object] = [type(self.layer), *map(type, entries)]
        if hidden is not None and self.regions.how.dynamic is not False:
            mark_changing_sizes(hidden, kwargs, entries)
            kind += [size > 1 for size in hidden.shape[:2]]
        return self.regions.entry(tuple(kind))(self.layer, args, kwargs)


def compile_layers(
    model: nn.Module,
    *,
    backend: str = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    fullgraph: bool = True,
    dynamic: bool | None = None,
) -> nn.Module:
    """Compile each of a model's repeated layers; layers that are alike share their graphs.

    The layers are those of the largest ``nn.ModuleList`` of the model, quantized or not; a model
    without such a list is compiled whole. Compilation happens when the model is called. The rows of
    the batch and the tokens may change in number without another compilation, except that 1 has
    graphs of its own. ``mode="reduce-overhead"`` makes a CUDA graph for each layer;
    :func:`mokernels.generate` makes one for all of them.

    Args:
        model: changed in place. What an earlier call did is replaced, unless it was the same.
        backend: ``"inductor"``, ``"mokernels"`` (see :mod:`mokernels.compile.backend`) or another
            that ``torch.compile`` knows.
        mode: as for ``torch.compile``.
        options: as for ``torch.compile``, and with ``backend="mokernels"`` ours.
        fullgraph: whether a graph break is an error.
        dynamic: as for ``torch.compile``; False compiles every size by itself.

    Returns:
        ``model``.

    Raises:
        ArgumentError: an option of ours is unknown.
    """
    how = HowToCompile(backend, mode, tuple((options or {}).items()), fullgraph, dynamic)
    if backend == "mokernels":
        split_options(options)
    present = attached_regions(model)
    if present is None or present.how != how:
        decompile_layers(model)
        Regions(how).attach(model)
    return model


def decompile_layers(model: nn.Module) -> nn.Module:
    """Let the layers run as they did before :func:`compile_layers`; returns ``model``."""
    for module in model.modules():
        if isinstance(module._compiled_call_impl, CompiledLayer):
            module._compiled_call_impl = None
    return model


def attached_regions(model: nn.Module) -> Regions | None:
    """The entry points that a model's layers run at present; None if they are not compiled."""
    for layer in regions_of(model):
        if isinstance(layer._compiled_call_impl, CompiledLayer):
            return layer._compiled_call_impl.regions
    return None


def regions_of(model: nn.Module) -> list[nn.Module]:
    """The layers that are compiled each by itself: the repeated ones, or the model as a whole."""
    return repeated_layers(model) or [model]


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the largest list of a model, and of other lists of the same classes.

    Args:
        model: any module.

    Returns:
        Modules that each hold linear layers, none inside another; empty if there are none.
    """
    lists = list(_outermost_lists(model))
    if not lists:
        return []
    largest = max(lists, key=_linear_weights)
    kinds = {type(layer) for layer in largest}
    return [layer for layers in lists for layer in layers if type(layer) in kinds]


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Lists of layers that are not inside such a list (as experts are)."""
    if isinstance(module, nn.ModuleList) and len(module) and all(map(_holds_linears, module)):
        yield module
        return
    for child in module.children():
        yield from _outermost_lists(child)


def _holds_linears(layer: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) for m in layer.modules() if m is not layer)


def _linear_weights(layers: nn.ModuleList) -> int:
    linears = [m for m in layers.modules() if isinstance(m, nn.Linear)]
    return sum(linear.in_features * linear.out_features for linear in linears)


def _call_layer(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # Named self: the paths of modules in a graph then begin as those of a compiled module do.
    return self._call_impl(*args, **kwargs)
