"""The rules on one module: every tensor is there, of the right dtype and shape, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mokernels.checkpoint.header import TensorInfo
from mokernels.checkpoint.plan import (
    FLOAT8_DTYPES,
    Group,
    evident_formats,
    fits,
    is_quantized,
    join,
    weight_size,
)
from mokernels.checkpoint.schema import QuantizationConfig
from mokernels.errors import Finding
from mokernels.formats import FOREIGN_LEAVES, FUSED_SUFFIXES, SCALAR_SHAPES, Format

EXPORT_AGAIN = "Export the model again with nvidia-modelopt, or ask who published the checkpoint."
DO_NOT_GUESS = "mokernels would have to guess, so it does not load the checkpoint."


def check_module(module: str, group: Group, config: QuantizationConfig) -> Iterator[Finding]:
    """Check one module; ``group`` is without the scales of a KV cache."""
    yield from _check_strays(module, group)
    if not is_quantized(group):
        return
    foreign = [leaf for leaf in group if leaf in FOREIGN_LEAVES]
    for leaf in foreign:
        yield _finding(
            _Place(module, leaf, group[leaf]),
            "tensor-foreign",
            f"the tensor belongs to {FOREIGN_LEAVES[leaf]}, which this version does not run",
            remedy=f"Without it the layer would compute something else. {EXPORT_AGAIN}",
        )
    if foreign or not config.formats:
        return
    if config.excludes(module):
        yield Finding(
            "excluded-but-quantized",
            "the layer is quantized, and the configuration excludes it from quantization",
            found=", ".join(group),
            wanted="a plain weight, or no pattern that matches the layer",
            remedy=f"{DO_NOT_GUESS} {EXPORT_AGAIN}",
            file=config.files[0],
            layer=module,
        )
    format = config.format_of(module)
    if format is None:
        yield _unlisted(module, group, config)
    elif not fits(format, group):
        yield from _check_layer(module, group, format)
    yield from _check_bias(module, group)


def _unlisted(module: str, group: Group, config: QuantizationConfig) -> Finding:
    rows = evident_formats(group)
    looks = f" (tensors of {' or '.join(row.name for row in rows)})" if rows else ""
    return Finding(
        "quantized-but-unlisted",
        "the layer is quantized, and the configuration lists it with no algorithm",
        found=", ".join(group) + looks,
        wanted="the layer among quantized_layers, or a plain weight",
        remedy=f"{DO_NOT_GUESS} {EXPORT_AGAIN}",
        file=config.files[0],
        layer=module,
    )


def _check_strays(module: str, group: Group) -> Iterator[Finding]:
    """Codes and scales that are no part of a layer, and would be loaded as plain numbers."""
    for leaf, info in group.items():
        if leaf.endswith(FUSED_SUFFIXES):
            yield _finding(
                _Place(module, leaf, info),
                "experts-fused",
                "the scale belongs to experts that are stored as one 3-D tensor",
                found=f"{_dtype(info)} {list(info.shape)}",
                wanted="one linear layer for each expert",
                remedy="Such layers are not run by this version of mokernels.",
            )
        elif info.dtype in FLOAT8_DTYPES and leaf not in ("weight", "weight_scale"):
            yield _finding(
                _Place(module, leaf, info),
                "codes-without-layer",
                "the tensor holds FP8 codes and is not the weight of a linear layer",
                found=f"{_dtype(info)} {list(info.shape)}",
                wanted="a 16-bit or 32-bit tensor",
                remedy=f"As plain numbers the codes would give garbage. {EXPORT_AGAIN}",
            )
        elif leaf in ("k_scale", "v_scale"):
            yield _finding(
                _Place(module, leaf, info),
                "kv-scale-misplaced",
                "the scale of a KV cache is not on a key or value projection",
                found=f"module {module!r}",
                wanted=f"a module called {leaf[0]}_proj",
                remedy=EXPORT_AGAIN,
            )


def _check_layer(module: str, group: Group, format: Format) -> Iterator[Finding]:
    """A layer that does not fit the format: say what is wrong with it."""
    weight = group.get("weight")
    if weight is None:
        yield Finding(
            "weight-missing",
            "the layer has scales and no weight",
            found=", ".join(group),
            wanted=f"{join(module, 'weight')!r}",
            remedy="Download all the shards again, or export the model again.",
            file=next(iter(group.values())).file,
            layer=module,
        )
        return
    others = [row for row in evident_formats(group) if row is not format]
    if others:
        yield _finding(
            _Place(module, "weight", weight),
            "format-contradiction",
            "the layer's tensors are not of the format that the configuration names",
            found=f"tensors of {' or '.join(row.name for row in others)}",
            wanted=f"tensors of {format.name}",
            remedy=f"{DO_NOT_GUESS} {EXPORT_AGAIN}",
        )
        return
    yield from _check_stored(module, group, format, weight)


def _check_stored(
    module: str, group: Group, format: Format, weight: TensorInfo
) -> Iterator[Finding]:
    size = weight_size(format, weight)
    if size is None:
        wanted = "[N, K]" if format.element.per_item == 1 else f"[N, K / {format.element.per_item}]"
        yield _bad_shape(module, "weight", weight, wanted, format)
        return
    if size[1] % format.k_multiple:
        yield _finding(
            _Place(module, "weight", weight),
            "k-multiple",
            f"{format.name} needs a number of input features that its groups divide",
            found=f"K = {size[1]}",
            wanted=f"a multiple of {format.k_multiple}",
            remedy=f"The layer cannot have been quantized to this format. {EXPORT_AGAIN}",
        )
        return
    stored = {spec.leaf: spec for spec in format.tensors(*size)}
    for leaf, spec in stored.items():
        info = group.get(leaf)
        if info is None:
            if spec.required:
                yield _missing(module, leaf, format, weight)
            continue
        if info.dtype != spec.dtype:
            yield _bad_dtype(module, leaf, info, str(spec.dtype).removeprefix("torch."), format)
        if info.shape not in spec.shapes:
            shapes = " or ".join(str(list(shape)) for shape in spec.shapes)
            yield _bad_shape(module, leaf, info, shapes, format)
    for leaf in group.keys() - {*stored, "bias"}:
        yield _finding(
            _Place(module, leaf, group[leaf]),
            "tensor-unknown",
            f"the tensor is none that a layer of {format.name} has",
            found=f"{_dtype(group[leaf])} {list(group[leaf].shape)}",
            wanted=f"only {', '.join(stored)} and bias",
            remedy=f"{DO_NOT_GUESS} {EXPORT_AGAIN}",
        )


def _check_bias(module: str, group: Group) -> Iterator[Finding]:
    bias, weight = group.get("bias"), group.get("weight")
    if bias is None or weight is None or not weight.shape:
        return
    if bias.shape != weight.shape[:1]:
        yield _bad_shape(module, "bias", bias, str(list(weight.shape[:1])), None)
    if not bias.dtype.is_floating_point or bias.dtype.itemsize < 2:
        yield _bad_dtype(module, "bias", bias, "bfloat16, float16 or float32", None)


def check_kv_scales(module: str, cache: Group) -> Iterator[Finding]:
    """Check dtype and shape of what a projection stores for a quantized KV cache."""
    for leaf, info in cache.items():
        if leaf.endswith("_bias"):
            if not info.dtype.is_floating_point or info.dtype.itemsize < 2:
                yield _bad_dtype(module, leaf, info, "bfloat16, float16 or float32", None)
            continue
        if str(info.dtype) != "torch.float32":
            yield _bad_dtype(module, leaf, info, "float32", None)
        if info.shape not in SCALAR_SHAPES:
            yield _bad_shape(module, leaf, info, "[] or [1]", None)


class _Place(NamedTuple):
    """A tensor that a finding is about."""

    module: str
    leaf: str
    info: TensorInfo


def _finding(
    place: _Place, rule: str, what: str, *, found: str = "", wanted: str = "", remedy: str = ""
) -> Finding:
    name = join(place.module, place.leaf)
    return Finding(rule, what, found, wanted, remedy, place.info.file, name, place.module or None)


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")


def _missing(module: str, leaf: str, format: Format, weight: TensorInfo) -> Finding:
    return Finding(
        "tensor-missing",
        f"a layer of {format.name} lacks its {leaf}",
        found=f"a weight of {_dtype(weight)} and no {leaf}",
        wanted=repr(join(module, leaf)),
        remedy="A guessed scale gives wrong numbers. Download all the shards again, or export the "
        "model again.",
        file=weight.file,
        layer=module,
    )


def _bad_dtype(
    module: str, leaf: str, info: TensorInfo, wanted: str, format: Format | None
) -> Finding:
    return _finding(
        _Place(module, leaf, info),
        "tensor-dtype",
        f"the {leaf} has not the dtype" + (f" of {format.name}" if format else " that it needs"),
        found=_dtype(info),
        wanted=wanted,
        remedy=f"Something has converted the tensor. {EXPORT_AGAIN}",
    )


def _bad_shape(
    module: str, leaf: str, info: TensorInfo, wanted: str, format: Format | None
) -> Finding:
    return _finding(
        _Place(module, leaf, info),
        "tensor-shape",
        f"the {leaf} has not the shape" + (f" of {format.name}" if format else " that it needs"),
        found=str(list(info.shape)),
        wanted=wanted,
        remedy=EXPORT_AGAIN,
    )
