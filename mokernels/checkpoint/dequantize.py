"""From a quantized checkpoint back to a plain one, a layer in memory at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mokernels.checkpoint.atomic import new_folder, write_bytes, write_json
from mokernels.checkpoint.audit import audit
from mokernels.checkpoint.config import CONFIG_FILE, QUANT_CONFIG_FILE
from mokernels.checkpoint.files import has_file, open_regular, read_json, refuse
from mokernels.checkpoint.plan import CheckpointPlan, LayerPlan, join
from mokernels.checkpoint.reader import INDEX_FILE, Checkpoint, open_checkpoint
from mokernels.checkpoint.stream import Promise, split_shards, write_shard
from mokernels.checkpoint.writer import SHARD_BYTES, name_shards
from mokernels.errors import ArgumentError, CheckpointError
from mokernels.layers import stored_weight

logger = logging.getLogger("mokernels")

DEQUANTIZED_DTYPES = ("bfloat16", "float16", "float32")
COPIED_SUFFIXES = (".jinja", ".json", ".model", ".py", ".tiktoken", ".txt")
"""Files that are copied: the tokenizer's, generation_config.json, a model's own code."""
_NOT_COPIED = frozenset({CONFIG_FILE, QUANT_CONFIG_FILE, INDEX_FILE})
_OUTPUT_LAYER = "lm_head"


@dataclass(frozen=True)
class Dequantized:
    """What :func:`dequantize` wrote.

    Attributes:
        path: the new folder.
        dtype: of the weights that were quantized, for example ``"bfloat16"``.
        layers: how many they are.
        nbytes: bytes of all tensors.
        dropped: names of the KV-cache scales, which a plain checkpoint has no place for.
    """

    path: Path
    dtype: str
    layers: int
    nbytes: int
    dropped: tuple[str, ...] = ()


def dequantize(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "bfloat16",
    max_shard_size: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dequantized:
    """Write the plain checkpoint that a quantized one stands for; any transformers loads it.

    Every quantized weight becomes what its codes and scales say, rounded once to ``dtype``; scales
    are dropped, all other tensors are copied to the byte. One layer is in memory at a time, and the
    folder appears only when it is complete. No model class is needed. What the checkpoint says
    about activations and the KV cache is lost: the plain model does not quantize them.

    Args:
        path: folder of the quantized checkpoint.
        out: folder to create.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"`` (which rounds nothing).
        max_shard_size: in bytes; a checkpoint of one shard has no index.
        progress: called with the number of tensors written, and of all.

    Returns:
        What was written.

    Raises:
        CheckpointError: the checkpoint is broken or not quantized, or ``out`` exists already.
        ArgumentError: ``dtype`` is none of the three.
        OSError: the disk is full, ...
    """
    target, wanted = Path(out), _checked_dtype(dtype)
    with open_checkpoint(path) as checkpoint:
        plan = _audited(checkpoint)
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        promises = promised_tensors(checkpoint, plan, wanted)
        with new_folder(target) as partial:
            _write(partial, checkpoint, plan, promises, max_shard_size, progress)
            _write_config(partial, checkpoint.path, plan, wanted)
            _copy_files(checkpoint.path, partial)
    nbytes = sum(promise.nbytes for promise in promises.values())
    dropped = tuple(join(name, leaf) for name, group in plan.kv_scales.items() for leaf in group)
    if dropped:
        logger.warning(
            "%d scales of the KV cache (%s, ...) were dropped: %s has no place for them.",
            len(dropped), dropped[0], target,
        )  # fmt: skip
    return Dequantized(target, _name(wanted), len(plan.layers), nbytes, dropped)


def dequantized_weight(
    checkpoint: Checkpoint, layer: LayerPlan, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weight [N, K] of one layer of an audited checkpoint, rounded once to ``dtype``."""
    leaves = [leaf for leaf in layer.tensors if leaf != "input_scale"]
    tensors = {leaf: checkpoint.tensor(join(layer.name, leaf)) for leaf in leaves}
    return stored_weight(layer.format, tensors, (layer.n, layer.k), dtype)


def promised_tensors(
    checkpoint: Checkpoint, plan: CheckpointPlan, dtype: torch.dtype
) -> dict[str, Promise]:
    """Every tensor of the plain checkpoint, in the order of the quantized one."""
    layers = {join(layer.name, "weight"): layer for layer in plan.layers}
    scales = {
        join(layer.name, leaf) for layer in plan.layers for leaf in layer.tensors
    } - layers.keys()
    scales |= {join(name, leaf) for name, group in plan.kv_scales.items() for leaf in group}
    return {
        name: Promise(dtype, (layers[name].n, layers[name].k))
        if name in layers
        else Promise(info.dtype, tuple(info.shape))
        for name, info in checkpoint.tensors.items()
        if name not in scales
    }


def _checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = _name(dtype) if isinstance(dtype, torch.dtype) else dtype
    if name not in DEQUANTIZED_DTYPES:
        raise ArgumentError(f"dtype is {name!r}, wanted one of {', '.join(DEQUANTIZED_DTYPES)}.")
    found: torch.dtype = getattr(torch, name)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _audited(checkpoint: Checkpoint) -> CheckpointPlan:
    report = audit(checkpoint, values="scales")
    if report.errors:
        raise CheckpointError(checkpoint.path, report.errors)
    if not report.plan.layers:
        raise refuse(
            checkpoint.path,
            "not-quantized",
            "there is nothing to dequantize",
            found="no quantized layer",
            wanted="a checkpoint of NVIDIA ModelOpt's, with scales beside its weights",
            remedy="Use it as it is.",
        )
    return report.plan


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    plan: CheckpointPlan,
    promises: Mapping[str, Promise],
    limit: int,
    progress: Callable[[int, int], None],
) -> None:
    layers = {join(layer.name, "weight"): layer for layer in plan.layers}
    done = 0

    def pieces(name: str) -> Iterator[Tensor]:
        nonlocal done
        if name in layers:
            yield dequantized_weight(checkpoint, layers[name], promises[name].dtype)
        else:
            yield from (piece for _, piece in checkpoint.chunks(name))
        done += 1
        progress(done, len(promises))

    written: list[tuple[Path, dict[str, int]]] = []
    for shard in split_shards(promises, limit):
        path = folder / f"{len(written)}.safetensors"
        write_shard(path, shard, pieces)
        written.append((path, {name: promise.nbytes for name, promise in shard.items()}))
    name_shards(folder, written)


def _write_config(folder: Path, source: Path, plan: CheckpointPlan, dtype: torch.dtype) -> None:
    """config.json without a word about quantization."""
    if not has_file(source, CONFIG_FILE):
        return
    config = read_json(source, CONFIG_FILE)
    # ModelOpt stores a quantized output layer beside an embedding that it is said to be tied to.
    untied = any(layer.name.rpartition(".")[2] == _OUTPUT_LAYER for layer in plan.layers)
    text = config.get("text_config")
    for part in [config, *([text] if isinstance(text, dict) else [])]:
        part.pop("quantization_config", None)
        if part is config or "dtype" in part or "torch_dtype" in part:
            part["torch_dtype" if "torch_dtype" in part else "dtype"] = _name(dtype)
        if untied and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    write_json(folder, CONFIG_FILE, config)


def _copy_files(source: Path, folder: Path) -> None:
    for name in sorted(os.listdir(source)):
        wanted = name.endswith(COPIED_SUFFIXES) and name not in _NOT_COPIED
        if wanted and not (source / name).is_dir():
            with open_regular(source, name) as file:
                write_bytes(folder / name, file.read())
