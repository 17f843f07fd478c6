"""Fusion with the default backend: our pass in Inductor's hook, behind whatever is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch._inductor.config as inductor_config
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from mokernels.compile.fusion import FusionPass, pass_for
from mokernels.compile.options import FusionOptions

HOOK = "post_grad_custom_pre_pass"

# Passes that are told whether the graph is for inference; older versions of torch have none.
_AWARE: type[CustomGraphPass] | None = getattr(
    custom_graph_pass, "CustomInferenceAwareGraphPass", None
)
_Base: Any = _AWARE or CustomGraphPass


class Chain(_Base):
    """Several passes, one after the other; older versions of torch take only one.

    Args:
        *passes: ``CustomGraphPass`` objects, or functions of a graph, which are not cacheable.
    """

    def __init__(self, *passes: Callable[..., Any]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph, is_inference: bool = False) -> None:
        """Run them in order, each with what it wants to know."""
        for run in self.passes:
            if _AWARE is not None and isinstance(run, _AWARE):
                run(graph, is_inference)
            else:
                run(graph)

    def uuid(self) -> Any:
        """All of theirs; None (do not cache) if one of them has none."""
        ids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if None in ids else tuple(ids)


def chained(present: Any, ours: FusionPass) -> CustomGraphPass:
    """``ours`` behind what the hook already holds: nothing, a pass, or a list of passes."""
    before = present if isinstance(present, (list, tuple)) else [present]
    passes = [p for p in before if p is not None]
    return Chain(*passes, ours) if passes else ours


def enable(options: FusionOptions | None = None) -> None:
    """Let ``torch.compile`` with its default backend fuse mokernels' operators in this process.

    Loading a checkpoint does this. The pass is put into Inductor's hook behind any pass that is
    already there. Calling it again replaces the options.

    Args:
        options: which rewrites may be done; all by default.
    """
    disable()
    present = getattr(inductor_config, HOOK)
    setattr(inductor_config, HOOK, chained(present, pass_for(options or FusionOptions())))


def disable() -> None:
    """Take back what :func:`enable` did; passes of others stay.

    Models that are compiled already keep their code; ``torch._dynamo.reset()`` forgets them.
    """
    present = getattr(inductor_config, HOOK)
    setattr(inductor_config, HOOK, without_ours(present))


def enabled_pass() -> FusionPass | None:
    """The pass that the hook holds, wherever it stands in a chain."""
    return _find(getattr(inductor_config, HOOK))


def _find(present: Any) -> FusionPass | None:
    if isinstance(present, FusionPass):
        return present
    parts = present.passes if isinstance(present, Chain) else present
    if isinstance(parts, (list, tuple)):
        return next((found for part in parts if (found := _find(part)) is not None), None)
    return None


def without_ours(present: Any) -> Any:
    """What a hook holds beside our pass: None, a pass, or several."""
    if isinstance(present, FusionPass):
        return None
    if isinstance(present, Chain):
        kept = [p for part in present.passes if (p := without_ours(part)) is not None]
        return Chain(*kept) if len(kept) > 1 else (kept[0] if kept else None)
    if isinstance(present, (list, tuple)):
        kept = [p for part in present if (p := without_ours(part)) is not None]
        return kept or None
    return present
