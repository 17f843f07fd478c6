"""The two JSON layouts of a quantization, as ModelOpt 0.47 writes them, key by key."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mokernels.checkpoint.config import parse_layout
from mokernels.checkpoint.files import read_json
from mokernels.formats import MIXED_PRECISION, Activation, Format, Granularity, find_format

LAYOUT_VERSION = "0.47.0"
"""Version of ModelOpt whose layout is written; loaders go by it."""

_LOWER_CASE = frozenset({"FP8_PB_WO"})
_DESCRIBED_BITS = {"FP8": 8, "NVFP4": 4}
"""Formats whose "config_groups" are written, and the bits of an element."""

Quantized = Format | Mapping[str, Format]
"""The format of all quantized layers, or of each by its name, in the model's order."""


def nested_layout(
    quantized: Quantized, exclude: Sequence[str], kv_cache: str | None
) -> dict[str, Any]:
    """Content of ``hf_quant_config.json``.

    Args:
        quantized: the format or formats of the quantized layers.
        exclude: patterns of module names that are not quantized; not written where layers differ,
            since every quantized layer is listed then.
        kv_cache: algorithm of the KV cache, or None.
    """
    format = one_format(quantized)
    if isinstance(format, Format):
        name = {"quant_algo": written_name(format), "kv_cache_quant_algo": kv_cache}
        body: dict[str, Any] = {**name, **_stated(format), "exclude_modules": list(exclude)}
    else:
        body = {"quant_algo": MIXED_PRECISION, "kv_cache_quant_algo": kv_cache}
        body["quantized_layers"] = {name: _stated(row) for name, row in format.items()}
    return {"producer": _producer(LAYOUT_VERSION), "quantization": body}


def flat_layout(
    quantized: Quantized, exclude: Sequence[str], kv_cache: str | None, *, static: bool = True
) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``.

    Args:
        quantized: the format or formats of the quantized layers.
        exclude: as in :func:`nested_layout`.
        kv_cache: algorithm of the KV cache, or None.
        static: whether the activation scales are stored (for FP8).
    """
    format = one_format(quantized)
    if not isinstance(format, Format):
        return _mixed(format) | _flat(MIXED_PRECISION, (), kv_cache, LAYOUT_VERSION)
    groups: dict[str, Any] = {}
    if format.name in _DESCRIBED_BITS:
        groups["config_groups"] = {"group_0": _group(format, static)}
    return groups | _flat(written_name(format), exclude, kv_cache, LAYOUT_VERSION)


def parse_quantization_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A ``hf_quant_config.json`` in the flat layout, as a ``quantization_config`` for transformers.

    The algorithm is not judged here, so that the loader can refuse it with the whole checkpoint.

    Raises:
        CheckpointError: the file is no such JSON file.
    """
    folder, name = os.path.split(Path(path))
    config = parse_layout(read_json(Path(folder), name), path=folder)
    row = find_format(config.algorithm) if config.algorithm else None
    if row is not None:
        return flat_layout(row, config.exclude, config.kv_cache)
    flat = _flat(config.algorithm, config.exclude, config.kv_cache, config.producer)
    listed = {name: layer.format for name, layer in config.quantized_layers.items()}
    known = {name: row for name, row in listed.items() if row is not None}
    if known and len(known) == len(listed):
        return _mixed(known) | flat
    if listed:
        layers = {n: {"quant_algo": row.algorithm} for n, row in config.quantized_layers.items()}
        flat["quantized_layers"] = layers
    return flat


def one_format(quantized: Quantized) -> Quantized:
    """The one format, if layers that are given by name have the same."""
    if isinstance(quantized, Format):
        return quantized
    rows = list(dict.fromkeys(quantized.values()))
    return rows[0] if len(rows) == 1 else quantized


def written_name(format: Format) -> str:
    """The format's name as ModelOpt writes it: it leaves some in lower case."""
    return format.name.lower() if format.name in _LOWER_CASE else format.name


def _flat(
    algorithm: str | None, exclude: Sequence[str], kv_cache: str | None, version: str | None
) -> dict[str, Any]:
    flat: dict[str, Any] = {"ignore": list(exclude), "quant_algo": algorithm}
    if kv_cache == "FP8":
        flat["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    elif kv_cache is not None:
        flat["kv_cache_scheme"] = kv_cache
    return flat | {"producer": _producer(version), "quant_method": "modelopt"}


def _group(format: Format, static: bool) -> dict[str, Any]:
    size = {"group_size": format.group_size} if format.group_size else {}
    bits = {"num_bits": _DESCRIBED_BITS[format.name], "type": "float", **size}
    dynamic = format.activation is Activation.FP8_STATIC and not static
    return {
        "input_activations": {"dynamic": dynamic, **bits},
        "weights": {"dynamic": False, **bits},
        "targets": ["Linear"],
    }


def _stated(format: Format) -> dict[str, Any]:
    """What is said of one format wherever it is named."""
    size = {"group_size": format.group_size} if format.group_size else {}
    return {"quant_algo": written_name(format), **size}


def _mixed(layers: Mapping[str, Format]) -> dict[str, Any]:
    """Each layer's format, once as groups of layers and once by name."""
    names: dict[Format, list[str]] = {}
    for name, row in layers.items():
        names.setdefault(row, []).append(name)
    groups = {
        f"group_{index}": {**_described(row), "targets": sorted(targets)}
        for index, (row, targets) in enumerate(names.items())
    }
    listed = {name: _stated(row) for name, row in layers.items()}
    return {"config_groups": groups, "quantized_layers": listed}


def _described(format: Format) -> dict[str, Any]:
    if format.granularity is Granularity.BLOCK:
        return {"quant_algo": written_name(format)}
    size = {"group_size": format.group_size} if format.group_size else {}
    bits = {"dynamic": False, "num_bits": 8 // format.element.per_item, "type": "float", **size}
    rows = {"strategy": "channel"} if format.granularity is Granularity.CHANNEL else {}
    return {"input_activations": bits, "weights": {**bits, **rows}}


def _producer(version: str | None) -> dict[str, Any]:
    return {"name": "modelopt", "version": version}
