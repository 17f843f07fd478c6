"""Layers that should be quantized and are not.

Without the model's classes that is judged by name and shape: a matrix whose name ends like that of
a quantized layer is most likely a layer that an export left out by accident.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from mokernels.checkpoint.plan import Group, is_quantized
from mokernels.checkpoint.schema import QuantizationConfig
from mokernels.errors import Finding
from mokernels.formats import EMBEDDING_NAMES

_VISION_PARTS = frozenset(
    {"vision_tower", "vision_model", "visual", "vision_encoder", "multi_modal_projector"}
)
_VISION_LISTED_SINCE = (0, 39)


def check_coverage(
    groups: Mapping[str, Group],
    config: QuantizationConfig,
    linear_names: Collection[str] | None,
) -> Iterator[Finding]:
    """One finding for each plain matrix that should be quantized.

    Where formats are mixed that is a layer that is listed; otherwise any that is not excluded.

    Args:
        groups: all modules.
        config: with the exclusions, or the list; without a format nothing has to be quantized.
        linear_names: see :func:`mokernels.checkpoint.audit.audit`.
    """
    quantized = {_last(module) for module, group in groups.items() if is_quantized(group)}
    if not config.formats or not quantized:
        return
    if config.mixed:
        yield from _check_list(groups, config, linear_names)
        return
    linear = None if linear_names is None else frozenset(linear_names)
    for module, group in groups.items():
        if is_quantized(group) or not _is_plain_matrix(group) or _exempt(module, config):
            continue
        if linear is None and _last(module) in quantized:
            yield _finding(module, group, config, "layers of the same name are quantized", "error")
        elif linear is None and _last(module) not in EMBEDDING_NAMES:
            yield _finding(module, group, config, "it may be a linear layer", "warning")
        elif linear is not None and module in linear:
            yield _finding(module, group, config, "it is a linear layer of the model", "error")


def _check_list(
    groups: Mapping[str, Group],
    config: QuantizationConfig,
    linear_names: Collection[str] | None,
) -> Iterator[Finding]:
    """Layers that are listed and plain, and names in the list that stand for nothing."""
    found: set[str] = set()
    for module, group in groups.items():
        listing = config.listing(module)
        if listing is None:
            continue
        if is_quantized(group):
            found.update(_containers(module))
        elif _is_plain_matrix(group) and (listing == module or _is_linear(module, linear_names)):
            found.update(_containers(module))
            yield _listed_but_plain(module, listing, group, config)
    for name, listed in config.quantized_layers.items():
        if name not in found:
            yield Finding(
                "listed-but-missing",
                "the configuration lists a quantized layer that the checkpoint lacks",
                found=", ".join(groups.get(name, ())) or "no tensor of that name",
                wanted=f"the tensors of a layer of {listed.algorithm}",
                remedy="Download all the shards again, or export the model again.",
                file=config.files[0],
                layer=name,
            )


def _containers(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


def _is_linear(module: str, linear_names: Collection[str] | None) -> bool:
    if linear_names is None:
        return _last(module) not in EMBEDDING_NAMES
    return module in linear_names


def _listed_but_plain(
    module: str, listing: str, group: Group, config: QuantizationConfig
) -> Finding:
    weight = group["weight"]
    how = "" if listing == module else f" by the name of its container {listing!r}"
    return Finding(
        "listed-but-plain",
        f"the configuration lists the layer as quantized{how}, and it is not",
        found=f"a plain weight of {str(weight.dtype).removeprefix('torch.')} and no weight_scale",
        wanted=f"a layer of {config.quantized_layers[listing].algorithm}",
        remedy="Export the model again; if the layer is meant to be plain, take it out of "
        "quantized_layers.",
        file=weight.file,
        tensor=f"{module}.weight",
        layer=module,
    )


def _is_plain_matrix(group: Group) -> bool:
    weight = group.get("weight")
    return weight is not None and len(weight.shape) == 2 and weight.dtype.is_floating_point


def _exempt(module: str, config: QuantizationConfig) -> bool:
    """Excluded, or of a vision tower in an export too old to list it among the exclusions."""
    if config.excludes(module):
        return True
    return _before(config.producer, _VISION_LISTED_SINCE) and not _VISION_PARTS.isdisjoint(
        module.split(".")
    )


def _before(version: str | None, since: tuple[int, int]) -> bool:
    numbers = (version or "").split(".")[:2]
    if len(numbers) < 2 or not all(part.isdecimal() and len(part) < 9 for part in numbers):
        return False
    return (int(numbers[0]), int(numbers[1])) < since


def _last(module: str) -> str:
    """Last part of a module's name; in a numbered list, the list's name with it."""
    parts = module.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdecimal() else parts[-1]


def _finding(
    module: str, group: Group, config: QuantizationConfig, why: str, severity: str
) -> Finding:
    weight = group["weight"]
    return Finding(
        "listed-but-plain",
        f"the layer is neither quantized nor excluded, and {why}",
        found=f"a plain weight of {str(weight.dtype).removeprefix('torch.')} and no weight_scale",
        wanted=f"a layer of {config.algorithm}, or a pattern in exclude_modules that matches it",
        remedy="Export the model again; if the layer is meant to be plain, add it to "
        "exclude_modules.",
        file=weight.file,
        tensor=f"{module}.weight",
        layer=module,
        severity="error" if severity == "error" else "warning",
    )
