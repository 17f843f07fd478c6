"""Tensor parallelism: how the scales of a quantized layer follow its weight.

transformers shards every parameter of a module by the module's style. Block scales follow the
weight as they are. A per-channel scale of a row-wise layer must not be split: every rank holds a
part of K and needs the scales of all of N. Scalars are buffers, which are never split. Activations
are quantized on each rank: per token, from the amax of the rank's part of a row-wise layer's input.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from mokernels.errors import BackendError
from mokernels.formats import SCALE_LEAVES
from mokernels.hf.experts import has_experts
from mokernels.layers import QuantizedLinear

REPLICATE = "replicate"


def scale_styles(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """Styles to add to a tensor-parallel plan, by parameter name with layer numbers as ``*``.

    Args:
        model: with its layers replaced, on the meta device.
        plan: style by module name with layer numbers as ``*``, as transformers writes it.
    """
    added = {}
    for name, parameter in model.named_parameters():
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        module, _, leaf = generic.rpartition(".")
        style = plan.get(module, "")
        if leaf in SCALE_LEAVES and parameter.dim() == 1 and "rowwise" in style:
            added[generic] = REPLICATE
    return added


def register_replicate() -> None:
    """Give transformers before 5.18 the style that leaves a parameter whole on every rank."""
    from transformers.distributed import tensor_parallel

    styles = tensor_parallel.ALL_PARALLEL_STYLES
    if REPLICATE not in styles:
        styles.register(REPLICATE, tensor_parallel.TensorParallelLayer())


def check_shards(model: nn.Module) -> None:
    """Refuse a layer whose blocks do not fall on the boundaries of its shards.

    Raises:
        BackendError: naming every such layer.
    """
    if has_experts(model) and getattr(model, "_device_mesh", None) is not None:
        raise BackendError(
            "Quantized experts cannot be spread over processes by this version, neither split nor "
            "each expert whole. Load the model on one device, or spread its layers by device_map."
        )
    broken = list(_broken_shards(model))
    if broken:
        raise BackendError(
            "These layers cannot be split for tensor parallelism, because their scales do not "
            f"follow the parts of the weight: {', '.join(broken)}. Use fewer ranks or load the "
            "model with device_map. FP8_PB_WO is not split by this version."
        )


def _broken_shards(model: nn.Module) -> Iterator[str]:
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear) or not hasattr(layer.weight, "to_local"):
            continue
        weight, scale = _local(layer.weight), _local(layer.weight_scale)
        n, k = weight.shape[0], weight.shape[1] * layer.format.element.per_item
        whole_blocks = k % layer.format.k_multiple == 0
        if not whole_blocks or tuple(scale.shape) not in layer.format.scale_shapes(n, k):
            yield f"{name} (weight {list(weight.shape)}, scale {list(scale.shape)} on this rank)"


def _local(tensor: Tensor) -> Tensor:
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
