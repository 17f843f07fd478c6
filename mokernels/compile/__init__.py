"""Fusion under ``torch.compile``: one pass over the graph, behind two doors.

With the default backend the pass stands in Inductor's hook: loading a checkpoint enables it, and
:func:`disable` takes it out. With ``torch.compile(model, backend="mokernels")`` it needs no global
state and takes options. :func:`report` says what it did. :func:`compile_layers` compiles a model by
its repeated layers, with either door.

This package imports Inductor only when a graph is to be compiled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mokernels.compile.options import FusionOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from mokernels.compile.reports import CompileReport

__all__ = [
    "FusionOptions",
    "compile_layers",
    "decompile_layers",
    "disable",
    "enable",
    "is_enabled",
    "report",
]


def compile_layers(
    model: nn.Module,
    *,
    backend: str = "inductor",
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    fullgraph: bool = True,
    dynamic: bool | None = None,
) -> nn.Module:
    """Compile a model by its layers; see :func:`mokernels.compile.regional.compile_layers`."""
    from mokernels.compile import regional

    how: dict[str, Any] = {"mode": mode, "options": options, "dynamic": dynamic}
    return regional.compile_layers(model, backend=backend, fullgraph=fullgraph, **how)


def decompile_layers(model: nn.Module) -> nn.Module:
    """Take :func:`compile_layers` back; returns ``model``."""
    from mokernels.compile import regional

    return regional.decompile_layers(model)


def enable(options: FusionOptions | None = None) -> None:
    """Fuse under the default backend; see :func:`mokernels.compile.hook.enable`."""
    from mokernels.compile import hook

    hook.enable(options)


def disable() -> None:
    """Take :func:`enable` back; passes that others have put into the hook stay."""
    from mokernels.compile import hook

    hook.disable()


def is_enabled() -> bool:
    """Whether the default backend fuses mokernels' operators."""
    from mokernels.compile import hook

    return hook.enabled_pass() is not None


def report(model: nn.Module | None = None) -> CompileReport:
    """What the pass did to the graphs that this process has compiled.

    Args:
        model: only graphs with layers of this model, compiled whole or by its parts; all graphs
            when None.

    Returns:
        A :class:`mokernels.compile.reports.CompileReport`; print it.
    """
    from mokernels.compile.fusion import PASSES, count_kernels
    from mokernels.compile.reports import CompileReport

    count_kernels()
    graphs: list[Any] = [graph for made in PASSES for graph in made.reports]
    if model is not None:
        names = [name for name, _ in model.named_modules()]
        graphs = [graph for graph in graphs if _belongs(graph.modules, names)]
    return CompileReport(tuple(graphs))


def _belongs(paths: frozenset[str], names: list[str]) -> bool:
    """Whether a graph's layers are layers of the model: a part is compiled under shorter paths."""
    ends = {name[start:] for name in names for start in _starts(name)}
    return any(path in ends or path in names for path in paths)


def _starts(name: str) -> list[int]:
    return [0, *(i + 1 for i, character in enumerate(name) if character == ".")]
