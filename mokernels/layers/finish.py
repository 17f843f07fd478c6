"""What remains to be done once a model's tensors are loaded."""

from __future__ import annotations

from torch import nn

from mokernels.compile import enable, is_enabled
from mokernels.layers.linear import QuantizedLinear
from mokernels.layers.siblings import link_siblings


def finish_loading(model: nn.Module) -> None:
    """Freeze and refresh the quantized layers, plan projections together, fuse when compiled.

    Args:
        model: with all tensors in place; layers that are offloaded may still be on the meta device.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            # Loaders let every floating parameter ask for a gradient, FP8 codes included.
            module.requires_grad_(False)
            module.refresh()
    link_siblings(model)
    if not is_enabled():  # with whatever options
        enable()
