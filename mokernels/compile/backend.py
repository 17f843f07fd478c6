"""``torch.compile(model, backend="mokernels")``: Inductor with our pass and no global state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch._inductor.config as inductor_config
from torch.fx import GraphModule

from mokernels.compile.fusion import pass_for
from mokernels.compile.hook import HOOK, chained, without_ours
from mokernels.compile.options import split_options


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
            :class:`mokernels.compile.FusionOptions`).

    Raises:
        ArgumentError: an option of ours is unknown.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    ours, inductors = split_options(options)
    patches = {**(list_mode_options(mode) if mode else {}), **inductors}
    present = patches.get(HOOK, getattr(inductor_config, HOOK))
    patches[HOOK] = chained(without_ours(present), pass_for(ours))
    compiled: Callable[..., Any] = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled
