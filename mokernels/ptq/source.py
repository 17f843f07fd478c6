"""What of a folder of plain weights is to be quantized, going by its JSON and headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mokernels.checkpoint.config import CONFIG_FILE, QUANT_CONFIG_FILE
from mokernels.checkpoint.files import checked_folder, has_file, read_json
from mokernels.checkpoint.header import TensorInfo
from mokernels.checkpoint.plan import group_modules, is_quantized
from mokernels.checkpoint.reader import Checkpoint
from mokernels.errors import ArgumentError
from mokernels.formats import EMBEDDING_NAMES, Format
from mokernels.ptq.config import QuantizeConfig
from mokernels.ptq.rehearse import check_features, no_scale, patterns_of

_TABLES = frozenset({"shared", "relative_attention_bias"})
"""T5's tables, whose names do not say that they are embeddings."""
_OUTPUT_LAYER = "lm_head"


@dataclass(frozen=True)
class Choice:
    """What of a folder becomes what.

    Attributes:
        layers: format of every layer to quantize, by name, in the order of the files.
        exclude: patterns of the modules that stay plain.
    """

    layers: Mapping[str, Format]
    exclude: tuple[str, ...]


def read_plain_config(folder: Path) -> dict[str, Any]:
    """Content of config.json of a folder that is not said to be quantized.

    Raises:
        CheckpointError: there is no such folder or file.
        ArgumentError: the JSON files say that the weights are quantized.
    """
    path = checked_folder(folder)
    config = read_json(path, CONFIG_FILE)
    text = config.get("text_config")
    stated = config.get("quantization_config") or (
        text.get("quantization_config") if isinstance(text, Mapping) else None
    )
    if stated or has_file(path, QUANT_CONFIG_FILE):
        where = f"{CONFIG_FILE} has a quantization_config" if stated else f"has {QUANT_CONFIG_FILE}"
        raise _quantized(path, where)
    return config


def choose(checkpoint: Checkpoint, config: Mapping[str, Any], wanted: QuantizeConfig) -> Choice:
    """Choose the layers by names and shapes.

    Raises:
        ArgumentError: weights are quantized already, experts or transposed weights are not
            excluded, nothing is left to quantize, or input features do not fit the format.
        CalibrationError: a layer's weight is empty.
    """
    for module, group in group_modules(checkpoint.tensors).items():
        if is_quantized(group):
            raise _quantized(checkpoint.path, f"the module {module!r} has codes or scales")
    matrices = _weights(checkpoint.tensors)
    _check_experts(checkpoint.tensors, wanted)
    tied = _ties(config)
    chosen: dict[str, Format] = {}
    for name, info in matrices.items():
        row = None if tied and _last(name) == _OUTPUT_LAYER else wanted.choose(name)
        if row is not None and len(info.shape) == 2 and not _is_table(name):
            chosen[name] = row
    if not chosen:
        raise ArgumentError(
            f"Nothing of {str(checkpoint.path)!r} would be quantized: none of its "
            f"{len(matrices)} weight matrices is left by the configuration and the exclusions. "
            "Exclude less."
        )
    _check_orientation(checkpoint.tensors, chosen)
    check_features({name: matrices[name].shape[1] for name in chosen}, chosen)
    for name in chosen:
        if not matrices[name].nbytes:
            raise no_scale(name)
    plain = [name for name in matrices if name not in chosen]
    plain += _unstored_output(config, matrices)
    return Choice(chosen, tuple(patterns_of(plain, chosen)))


def _weights(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Modules with a weight of two dimensions or, as convolutions have, more."""
    return {
        name.removesuffix(".weight"): info
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) > 1 and info.dtype.is_floating_point
    }


def _is_table(module: str) -> bool:
    last = _last(module)
    return last in EMBEDDING_NAMES or last in _TABLES or "embed" in last


def _check_experts(tensors: Mapping[str, TensorInfo], wanted: QuantizeConfig) -> None:
    """Experts of one tensor would be left out without a word."""
    found = []
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        fused = len(info.shape) == 3 and ("expert" in name.lower() or "moe" in name.lower())
        if fused and wanted.choose(module) is not None:
            found.append((module, info.shape))
    if found:
        module, shape = found[0]
        usual = all(".experts." in f".{name}" for name, _ in found)
        remedy = "['*experts.*']" if usual else f"{[name for name, _ in found[:3]]}, and the others"
        raise ArgumentError(
            f"The weights {module!r} {list(shape)} and {len(found) - 1} more are experts in one "
            f"tensor, which this version does not quantize. Leave them plain with exclude={remedy}."
        )


def _check_orientation(tensors: Mapping[str, TensorInfo], chosen: Iterable[str]) -> None:
    """GPT-2 stores [K, N]; where a bias has not N elements, the weight is no nn.Linear's."""
    for name in chosen:
        bias, weight = tensors.get(f"{name}.bias"), tensors[f"{name}.weight"]
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ArgumentError(
                f"The weight of {name!r} is {list(weight.shape)} and its bias {list(bias.shape)}, "
                f"wanted a bias of {weight.shape[0]} elements as nn.Linear has it. Models that "
                "store their weights transposed, such as GPT-2, cannot be quantized."
            )


def _unstored_output(config: Mapping[str, Any], modules: Iterable[str]) -> list[str]:
    """The output layer of a model whose file holds the embedding alone: it is excluded by name."""
    names = [_last(name) for name in modules]
    kinds = ("ForCausalLM", "ForConditionalGeneration")
    generates = any(str(name).endswith(kinds) for name in config.get("architectures") or ())
    embeds = not EMBEDDING_NAMES.isdisjoint(names)
    return [_OUTPUT_LAYER] if generates and embeds and _OUTPUT_LAYER not in names else []


def _ties(config: Mapping[str, Any]) -> bool:
    text = config.get("text_config")
    parts = [config, text if isinstance(text, Mapping) else {}]
    return any(part.get("tie_word_embeddings") is True for part in parts)


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _quantized(folder: Path, found: str) -> ArgumentError:
    return ArgumentError(
        f"The folder {str(folder)!r} holds quantized weights already: {found}. Give the folder of "
        "the original model: what rounding took away does not come back."
    )
