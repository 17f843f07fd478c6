"""A checkpoint folder as a table of tensors that are read one at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mokernels.checkpoint.config import read_quantization
from mokernels.checkpoint.files import (
    DOWNLOAD_AGAIN,
    brief,
    checked_folder,
    has_file,
    is_plain_name,
    read_json,
    refuse,
    resolve,
)
from mokernels.checkpoint.header import TensorInfo, read_header
from mokernels.checkpoint.plan import shows_codes
from mokernels.checkpoint.schema import QuantizationConfig
from mokernels.errors import ArgumentError, CheckpointError, Finding

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CHUNK_BYTES = 16 * 2**20
"""Size of the pieces in which :meth:`Checkpoint.chunks` reads a tensor."""


class Checkpoint:
    """The tensors of a checkpoint folder; use it in a ``with`` statement, or call ``close``.

    Attributes:
        path: the folder.
        tensors: every tensor, by name.
        config: what the JSON files say about quantization.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorInfo], config: QuantizationConfig
    ) -> None:
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.config = config
        self._handles: dict[str, Any] = {}

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the safetensors files that hold the tensors."""
        return tuple(sorted({info.file for info in self.tensors.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor to the CPU; its dtype and shape are those of ``tensors[name]``.

        Raises:
            ArgumentError: the checkpoint has no tensor of that name.
            CheckpointError: the file cannot be read any more.
        """
        info = self._info(name)
        try:
            tensor: Tensor = self._handle(info.file).get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise self._changed(name, info, str(error)) from error
        return self._verified(name, info, tensor, info.shape)

    def chunks(self, name: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """The tensor ``name`` in pieces of about 16 MiB along its first dimension.

        Args:
            name: of the tensor.
            multiple: every piece but the last has a number of rows divisible by this.

        Yields:
            (index of the piece's first row, the piece); a scalar comes whole, with index 0.
        """
        info = self._info(name)
        if info.nbytes <= CHUNK_BYTES or not info.shape:
            yield 0, self.tensor(name)
            return
        rows = max(1, CHUNK_BYTES * info.shape[0] // info.nbytes)
        rows = -(-rows // multiple) * multiple
        for start in range(0, info.shape[0], rows):
            yield start, self._rows(name, info, start, min(start + rows, info.shape[0]))

    def close(self) -> None:
        """Close the files; tensors that were read stay valid."""
        handles, self._handles = self._handles, {}
        for handle in handles.values():
            handle.__exit__(None, None, None)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}: {len(self.tensors)} tensors, {self.nbytes} bytes)"

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ArgumentError(
                f"The checkpoint {str(self.path)!r} has no tensor {name!r}. "
                "Take a name from Checkpoint.tensors."
            )
        return self.tensors[name]

    def _handle(self, file: str) -> Any:
        if file not in self._handles:
            opened: Any = safe_open(
                os.fspath(resolve(self.path, file)), framework="pt", device="cpu"
            )
            self._handles[file] = opened.__enter__()
        return self._handles[file]

    def _rows(self, name: str, info: TensorInfo, start: int, stop: int) -> Tensor:
        try:
            piece: Tensor = self._handle(info.file).get_slice(name)[start:stop]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise self._changed(name, info, str(error)) from error
        return self._verified(name, info, piece, (stop - start, *info.shape[1:]))

    def _verified(
        self, name: str, info: TensorInfo, tensor: Tensor, shape: tuple[int, ...]
    ) -> Tensor:
        if tensor.dtype != info.dtype or tuple(tensor.shape) != shape:
            raise self._changed(name, info, f"{tensor.dtype} {tuple(tensor.shape)}")
        return tensor

    def _changed(self, name: str, info: TensorInfo, found: str) -> CheckpointError:
        return refuse(
            self.path,
            "tensor-unreadable",
            "a tensor cannot be read as its header describes it",
            file=info.file,
            tensor=name,
            found=brief(found),
            wanted=f"{info.dtype} {info.shape}",
            remedy="Check that nothing else is writing to the folder; then download it again.",
        )


def open_checkpoint(
    folder: str | os.PathLike[str], *, config: QuantizationConfig | None = None
) -> Checkpoint:
    """Open a checkpoint folder: read its JSON files and safetensors headers, and no tensor data.

    Args:
        folder: holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards, or
            else exactly one file ``*.safetensors``.
        config: what is known about the quantization already; read from the folder when None.

    Raises:
        CheckpointError: with everything that is wrong with the files.
        UnsupportedFormatError: the configuration names an algorithm that this version has not.
    """
    path = checked_folder(folder)
    if config is None:
        config = read_quantization(path)
    if has_file(path, INDEX_FILE):
        return Checkpoint(path, _read_sharded(path), config)
    return Checkpoint(path, read_header(path, _single_file(path)), config)


def looks_quantized(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder's safetensors files hold FP8 codes or weight scales, going by the headers.

    False where there are no such files or where they are broken: loading them fails by itself.
    """
    try:
        with open_checkpoint(folder, config=QuantizationConfig()) as checkpoint:
            return any(shows_codes(name, info) for name, info in checkpoint.tensors.items())
    except CheckpointError:
        return False


def _single_file(folder: Path) -> str:
    if has_file(folder, SINGLE_FILE):
        return SINGLE_FILE
    names = sorted(os.listdir(folder))
    candidates = [name for name in names if name.endswith(".safetensors")]
    if len(candidates) == 1:
        return candidates[0]
    raise refuse(
        folder,
        "weights-missing",
        "the folder has several safetensors files and no index"
        if candidates
        else "the folder has no safetensors file",
        found=", ".join(map(repr, (candidates or names)[:12])) or "an empty folder",
        wanted=f"{SINGLE_FILE}, or {INDEX_FILE} with its shards",
        remedy="Download the missing files."
        if candidates
        else "Pickled weights (.bin, .pt, .pth) and GGUF files are never read; "
        "get the safetensors files of this checkpoint.",
    )


def _read_sharded(folder: Path) -> dict[str, TensorInfo]:
    contents: dict[str, list[str]] = {}
    for tensor, shard in _read_index(folder).items():
        contents.setdefault(shard, []).append(tensor)
    findings: list[Finding] = []
    tensors: dict[str, TensorInfo] = {}
    for shard, expected in sorted(contents.items()):
        try:
            header = read_header(folder, shard)
        except CheckpointError as error:
            findings += error.findings
            continue
        findings += _check_shard(shard, header, tensors, expected)
        tensors |= header
    if findings:
        raise CheckpointError(folder, findings)
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name to shard, with plain file names only."""
    shard_of = read_json(folder, INDEX_FILE).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise _bad_index(folder, f"the weight_map {brief(shard_of)}")
    for tensor, shard in shard_of.items():
        if not isinstance(shard, str):
            raise _bad_index(folder, f"the file {brief(shard)} for tensor {brief(tensor)}")
    shards = sorted(set(shard_of.values()))
    findings = [_bad_shard_name(shard) for shard in shards if not is_plain_name(shard)]
    if SINGLE_FILE not in shards and has_file(folder, SINGLE_FILE):
        findings.append(
            Finding(
                "weights-ambiguous",
                "the folder has two sets of weights",
                found=f"{SINGLE_FILE}, and {INDEX_FILE} that does not name it",
                wanted="one of them",
                remedy="Remove the set that is not meant.",
            )
        )
    if findings:
        raise CheckpointError(folder, findings)
    return shard_of


def _bad_index(folder: Path, found: str) -> CheckpointError:
    return refuse(
        folder,
        "index-invalid",
        "the index does not say which file holds which tensor",
        file=INDEX_FILE,
        found=found,
        wanted="an object weight_map from tensor names to file names",
        remedy=DOWNLOAD_AGAIN,
    )


def _bad_shard_name(shard: str) -> Finding:
    return Finding(
        "file-name",
        "the index names a file outside of the folder",
        file=INDEX_FILE,
        found=brief(shard),
        wanted="the plain name of a file in the folder",
        remedy="Do not load this checkpoint unless you trust who made it.",
    )


def _check_shard(
    shard: str,
    header: Mapping[str, TensorInfo],
    earlier: Mapping[str, TensorInfo],
    expected: Collection[str],
) -> Iterator[Finding]:
    """Where a shard and the index disagree; ``expected`` is what the index places in the shard."""
    remedy = "Download the shard and the index again; they are not of the same checkpoint."
    for tensor in header:
        if tensor in earlier:
            what = f"the tensor is also in {earlier[tensor].file!r}"
            yield Finding("tensor-duplicate", what, remedy=remedy, file=shard, tensor=tensor)
    for tensor in sorted(header.keys() - set(expected) - earlier.keys()):
        what = "the index does not place the tensor in the shard that holds it"
        yield Finding("index-mismatch", what, remedy=remedy, file=shard, tensor=tensor)
    for tensor in sorted(set(expected) - header.keys()):
        what = "the shard lacks a tensor that the index places there"
        yield Finding("index-mismatch", what, remedy=remedy, file=shard, tensor=tensor)
