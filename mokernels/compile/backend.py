"""``torch.compile(model, backend="mokernels")``: Inductor with our pass and no global state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch._inductor.config as inductor_config
from torch.fx import GraphModule

from mokernels.compile.fusion import pass_for
from mokernels.compile.hook import HOOK, chained, without_ours
from mokernels.compile.options import PREFIX, split_options
from mokernels.errors import ArgumentError


def mokernels(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph; Dynamo calls this.

    Args:
        gm: the graph.
        example_inputs: fake tensors.
        mode: as for Inductor (``"reduce-overhead"``, ``"max-autotune"``, ...).
        options: Inductor's, and ours (``mokernels.fuse_norm`` and so on; see
            :class:`mokernels.compile.FusionOptions`). ``torch.compile`` takes either a mode or
            options; ``torch._inductor.list_mode_options`` has the options that a mode stands for.

    Raises:
        ArgumentError: an option is known neither to us nor to Inductor.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    ours, inductors = split_options(options)
    patches = {**(list_mode_options(mode) if mode else {}), **_checked(inductors)}
    present = patches.get(HOOK, getattr(inductor_config, HOOK))
    patches[HOOK] = chained(without_ours(present), pass_for(ours))
    compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options, which may be spelled with hyphens, by their names."""
    named = {key.replace("-", "_"): chosen for key, chosen in options.items()}
    unknown = named.keys() - inductor_config.get_config_copy().keys()
    if unknown:
        raise ArgumentError(
            f"torch.compile was given the option {min(unknown)!r}, which Inductor does not know. "
            f"Inductor's are listed by torch._inductor.list_options(), ours begin with {PREFIX!r}."
        )
    return named


def _reset() -> None:
    """``torch._dynamo.reset()`` calls this: CUDA graphs and their memory are let go."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


mokernels.reset = _reset  # type: ignore[attr-defined]
