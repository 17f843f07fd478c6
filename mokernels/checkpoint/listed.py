"""The rules on ``quantized_layers``, in which mixed precision gives each layer an algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mokernels.checkpoint.files import brief
from mokernels.checkpoint.schema import RESTORE, ListedLayer, QuantizationConfig
from mokernels.errors import Finding
from mokernels.formats import (
    FP8_BLOCK,
    LATER_FORMATS,
    MIXED_PRECISION,
    Format,
    Granularity,
    supported_names,
)

_KEY = "quantized_layers"


def check_listed(config: QuantizationConfig) -> Iterator[Finding]:
    """The list of a checkpoint in mixed precision: it is there, and of formats that are run."""
    if not config.quantized_layers:
        yield Finding(
            "layers-missing",
            "the configuration mixes formats and does not say which layer has which",
            found=f"{MIXED_PRECISION} and no {_KEY}",
            wanted=f"{_KEY} with the quant_algo of every quantized layer",
            remedy=RESTORE,
            file=config.files[0],
        )
    for algorithm, names in _by_algorithm(config).items():
        yield Finding(
            "format-unsupported",
            "this version does not run an algorithm of the checkpoint's layers",
            found=f"{brief(algorithm)} of {len(names)} of {len(config.quantized_layers)} layers",
            wanted=f"one of {supported_names()}",
            remedy=_remedy(algorithm),
            file=config.files[0],
            layer=names[0],
        )


def check_unlisted(config: QuantizationConfig, row: Format | None) -> Iterator[Finding]:
    """Where all layers are said to have one format, a list of others would be ignored."""
    for name, listed in config.quantized_layers.items():
        if row is None or listed.format is not row:
            yield Finding(
                "layers-contradiction",
                f"the configuration contradicts itself about a layer of its {_KEY}",
                found=f"quant_algo {brief(config.algorithm)} and {listed.algorithm} for the layer",
                wanted=f"quant_algo '{MIXED_PRECISION}', or the same algorithm for the layer",
                remedy=RESTORE,
                file=config.files[0],
                layer=name,
            )
            return


def check_group_sizes(config: QuantizationConfig) -> Iterator[Finding]:
    """The group sizes that the configuration states, against those of its formats."""
    file = config.files[0] if config.files else None
    fitting = {size for row in config.formats for size in group_sizes(row)}
    if config.formats and config.group_size not in {*fitting, None}:
        names = ", ".join(row.name for row in config.formats)
        yield _group_size(names, config.group_size, _wanted(*config.formats), file, None)
    seen = set()
    for name, listed in (config.quantized_layers if config.mixed else {}).items():
        row = listed.format
        if row and listed.group_size not in group_sizes(row) and listed not in seen:
            seen.add(listed)  # once for all the layers that are listed alike
            yield _group_size(row.name, listed.group_size, _wanted(row), file, name)


def differences(
    first: QuantizationConfig, second: QuantizationConfig
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """What two files list differently: a layer's algorithm in each, by name."""
    ours, theirs = first.quantized_layers, second.quantized_layers
    names = [n for n in {**ours, **theirs} if not _agree(ours.get(n), theirs.get(n))]
    listed = [{n: _text(layers[n]) for n in names if n in layers} for layers in (ours, theirs)]
    return listed[0], listed[1]


def group_sizes(format: Format) -> tuple[int | None, ...]:
    """What the configuration may say; None where it says nothing."""
    if format.granularity is Granularity.BLOCK:
        return (None, 0, FP8_BLOCK)
    return (None, format.group_size)


def _wanted(*formats: Format) -> str:
    return " or ".join(dict.fromkeys(str(row.group_size or "none") for row in formats))


def _group_size(
    names: str, found: int | None, wanted: str, file: str | None, layer: str | None
) -> Finding:
    return Finding(
        "group-size",
        f"the group size does not fit {names}",
        found=str(found),
        wanted=wanted,
        remedy="mokernels would have to guess, so it does not load the checkpoint. Export the "
        "model again with nvidia-modelopt, or ask who published the checkpoint.",
        file=file,
        layer=layer,
    )


def _by_algorithm(config: QuantizationConfig) -> dict[str, list[str]]:
    """The layers of every algorithm that is not run, so that each is told once."""
    found: dict[str, list[str]] = {}
    for name, listed in config.quantized_layers.items():
        if listed.format is None:
            found.setdefault(listed.algorithm.strip().upper(), []).append(name)
    return found


def _remedy(algorithm: str) -> str:
    known = f"{algorithm} is an algorithm of ModelOpt that mokernels does not run yet. "
    remedy = "Take a checkpoint without such layers, or a later version of mokernels."
    return (known if algorithm in LATER_FORMATS else "") + remedy


def _agree(one: ListedLayer | None, other: ListedLayer | None) -> bool:
    if one is None or other is None:
        return one is other
    sizes = {one.group_size, other.group_size} - {None}
    return _name(one) == _name(other) and len(sizes) < 2


def _name(listed: ListedLayer) -> str:
    return listed.format.name if listed.format else listed.algorithm.strip().upper()


def _text(listed: ListedLayer) -> str:
    return _name(listed) + (f" in groups of {listed.group_size}" if listed.group_size else "")
