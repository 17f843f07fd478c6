"""Writing a safetensors file whose tensors are made one after the other.

``safetensors.torch.save_file`` wants all of a file's tensors at once. What is written here is known
by dtype and shape beforehand, so the header can go first and the data can follow as it is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mokernels.checkpoint.atomic import sync_file
from mokernels.checkpoint.header import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # bytes; the data begins at a multiple


@dataclass(frozen=True)
class Promise:
    """What a tensor that is still to be made will be."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        size: int = math.prod(self.shape) * self.dtype.itemsize
        return size


def split_shards(promises: Mapping[str, Promise], limit: int) -> list[dict[str, Promise]]:
    """The tensors in files of at most ``limit`` bytes, in their order; a larger one is alone."""
    shards: list[dict[str, Promise]] = [{}]
    size = 0
    for name, promise in promises.items():
        if shards[-1] and size + promise.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = promise
        size += promise.nbytes
    return shards


def write_shard(
    path: Path, promises: Mapping[str, Promise], pieces: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write one safetensors file, synced to the disk.

    Args:
        path: a new file.
        promises: every tensor of the file.
        pieces: makes the tensor of a name, whole or in pieces along its first dimension; called
            for each once, when it is its turn.
    """
    with path.open("xb") as file:
        file.write(_header(promises))
        for name, promise in promises.items():
            written = _write_tensor(file, promise, pieces(name))
            assert written == promise.nbytes, f"{name}: {written} bytes, {promise.nbytes} promised"
        file.flush()
    sync_file(path)


def _write_tensor(file: BinaryIO, promise: Promise, pieces: Iterable[Tensor]) -> int:
    """Bytes written; a function of its own, so that the last piece is freed before the next."""
    written = 0
    for piece in pieces:
        assert piece.dtype == promise.dtype, f"{piece.dtype}, {promise.dtype} promised"
        flat = piece.detach().contiguous().reshape(-1).view(torch.uint8)
        file.write(memoryview(flat.numpy()))
        written += flat.numel()
    return written


def _header(promises: Mapping[str, Promise]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, promise in promises.items():
        end = start + promise.nbytes
        entries[name] = {
            "dtype": _NAMES[promise.dtype],
            "shape": list(promise.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
