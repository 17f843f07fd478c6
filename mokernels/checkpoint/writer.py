"""Writing a checkpoint in ModelOpt's layout, one shard in memory at a time, all or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mokernels.checkpoint.atomic import new_folder, sync_file, write_bytes, write_json
from mokernels.checkpoint.audit import check
from mokernels.checkpoint.config import CONFIG_FILE, QUANT_CONFIG_FILE
from mokernels.checkpoint.files import is_plain_name
from mokernels.checkpoint.layout import Quantized, flat_layout, nested_layout
from mokernels.checkpoint.reader import INDEX_FILE, SINGLE_FILE
from mokernels.errors import ArgumentError, CheckpointError

SHARD_BYTES = 5_000_000_000
"""Largest shard, unless one tensor alone is larger."""

_METADATA = {"format": "pt"}


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: Mapping[str, Any],
    format: Quantized,
    *,
    exclude: Sequence[str] = (),
    kv_cache: str | None = None,
    max_shard_size: int = SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    verify: bool = True,
) -> Path:
    """Write a checkpoint folder that vLLM, SGLang, TensorRT-LLM and mokernels load.

    The folder appears only when it is complete: everything is written to a temporary folder beside
    it, synced to the disk and renamed.

    Args:
        folder: to create; its parent has to exist. An empty folder is replaced.
        tensors: every tensor of the checkpoint under its checkpoint name, for example from
            :func:`quantize_weight`; read once and in order, and kept in memory for one shard only.
        config: content of ``config.json``; a ``quantization_config`` in it is replaced.
        format: of the quantized layers; where they differ, the format of each by its name.
        exclude: patterns of the module names that are not quantized; where the formats differ they
            are not written, since every quantized layer is listed.
        kv_cache: algorithm of the KV cache, for example "FP8", or None.
        max_shard_size: in bytes; a checkpoint of one shard has no index.
        extra_files: other files to put into the folder, for example the tokenizer's.
        verify: audit the scales of what was written before it is given its name.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder exists and is not empty, or the audit found errors.
        ArgumentError: a tensor comes twice, or a file name is not a plain name.
        OSError: the disk is full, the parent does not exist, ...
    """
    target = Path(folder)
    with new_folder(target) as partial:
        shards = _write_shards(partial, tensors, max_shard_size)
        names = [name for _, sizes in shards for name in sizes]
        static = any(name.endswith(".input_scale") for name in names)
        name_shards(partial, shards)
        section = flat_layout(format, exclude, kv_cache, static=static)
        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        write_json(partial, CONFIG_FILE, {**plain, "quantization_config": section})
        write_json(partial, QUANT_CONFIG_FILE, nested_layout(format, exclude, kv_cache))
        for name, data in (extra_files or {}).items():
            _write_extra(partial, name, data)
        if verify:
            _verify(partial, target)
    return target


def _write_shards(
    folder: Path, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], limit: int
) -> list[tuple[Path, dict[str, int]]]:
    """Write the tensors to numbered files: [(file, bytes of each tensor in it)]."""
    shards: list[tuple[Path, dict[str, int]]] = []
    seen: set[str] = set()
    for shard in _batches(tensors, limit):
        repeated = seen & shard.keys()
        if repeated:
            raise ArgumentError(
                f"The tensor {min(repeated)!r} comes twice. Give every tensor of a checkpoint once."
            )
        seen |= shard.keys()
        path = folder / f"{len(shards)}.safetensors"
        save_file(shard, path, metadata=_METADATA)
        sync_file(path)
        shards.append((path, {name: tensor.nbytes for name, tensor in shard.items()}))
    return shards


def _batches(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], limit: int
) -> Iterator[dict[str, Tensor]]:
    batch: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        if batch and (size + tensor.nbytes > limit or name in batch):
            yield batch
            batch, size = {}, 0
        # A copy: views of one storage (tied or fused weights) cannot be stored as they are.
        batch[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    yield batch


def name_shards(folder: Path, shards: Sequence[tuple[Path, dict[str, int]]]) -> None:
    """Give the shards their final names, and write the index if there are several."""
    if len(shards) == 1:
        shards[0][0].rename(folder / SINGLE_FILE)
        return
    places: dict[str, str] = {}
    for number, (path, sizes) in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / name)
        places |= dict.fromkeys(sizes, name)
    total = sum(sum(sizes.values()) for _, sizes in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_json(folder, INDEX_FILE, index)


def _write_extra(folder: Path, name: str, data: bytes) -> None:
    if not is_plain_name(name) or os.path.lexists(folder / name):
        raise ArgumentError(
            f"extra_files has the name {name!r}, wanted the plain name of a file that is not part "
            "of the checkpoint itself."
        )
    write_bytes(folder / name, data)


def _verify(partial: Path, target: Path) -> None:
    errors = check(partial, values="scales").errors
    if errors:
        raise CheckpointError(target, errors)
