"""The two JSON layouts of a quantization, as ModelOpt 0.47 writes them, key by key."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mokernels.checkpoint.config import parse_layout
from mokernels.checkpoint.files import read_json
from mokernels.formats import Activation, Format, find_format

LAYOUT_VERSION = "0.47.0"
"""Version of ModelOpt whose layout is written; loaders go by it."""

_LOWER_CASE = frozenset({"FP8_PB_WO"})
_DESCRIBED_BITS = {"FP8": 8, "NVFP4": 4}
"""Formats whose "config_groups" are written, and the bits of an element."""


def nested_layout(format: Format, exclude: Sequence[str], kv_cache: str | None) -> dict[str, Any]:
    """Content of ``hf_quant_config.json``.

    Args:
        format: of the quantized layers.
        exclude: patterns of module names that are not quantized.
        kv_cache: algorithm of the KV cache, or None.
    """
    body: dict[str, Any] = {"quant_algo": written_name(format), "kv_cache_quant_algo": kv_cache}
    if format.group_size:
        body["group_size"] = format.group_size
    body["exclude_modules"] = list(exclude)
    return {"producer": _producer(LAYOUT_VERSION), "quantization": body}


def flat_layout(
    format: Format, exclude: Sequence[str], kv_cache: str | None, *, static: bool = True
) -> dict[str, Any]:
    """``quantization_config`` of ``config.json``.

    Args:
        format: of the quantized layers.
        exclude: patterns of module names that are not quantized.
        kv_cache: algorithm of the KV cache, or None.
        static: whether the activation scales are stored (for FP8).
    """
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
    if config.quantized_layers:
        layers = {key: {"quant_algo": value} for key, value in config.quantized_layers.items()}
        flat["quantized_layers"] = layers
    return flat


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


def _producer(version: str | None) -> dict[str, Any]:
    return {"name": "modelopt", "version": version}
