"""The header of a safetensors file, parsed and checked before any data is read.

A file is ``length`` (8 bytes, little endian), ``length`` bytes of JSON, then the data. The JSON
maps the name of each tensor to its dtype, its shape and its byte range in the data. The ranges have
to tile the data: no overlap, no hole, nothing left over.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mokernels.checkpoint.files import (
    DOWNLOAD_AGAIN,
    MAX_JSON_BYTES,
    brief,
    open_regular,
    parse_json,
    refuse,
)
from mokernels.errors import CheckpointError, Finding

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
        "I16": torch.int16,
        "U16": torch.uint16,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I32": torch.int32,
        "U32": torch.uint32,
        "F32": torch.float32,
        "I64": torch.int64,
        "U64": torch.uint64,
        "F64": torch.float64,
        "C64": torch.complex64,
    }
)
"""The dtypes that are read, by their name in a file."""

_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 2**63 - 1
_METADATA = "__metadata__"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it is.

    Attributes:
        file: name of the file in the checkpoint's folder.
        dtype: of the elements.
        shape: sizes, () for a scalar.
        start: position of its first byte in the file.
        end: position behind its last byte in the file.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return self.end - self.start


def read_header(folder: Path, name: str) -> dict[str, TensorInfo]:
    """The tensors of the safetensors file ``name`` of ``folder``, in the order of their data.

    Raises:
        CheckpointError: with everything that is wrong with the header.
    """
    text, size = _read_text(folder, name)
    entries = parse_json(text, folder, name)
    begin = _LENGTH_BYTES + len(text)
    tensors: dict[str, TensorInfo] = {}
    findings: list[Finding] = list(_check_metadata(entries.pop(_METADATA, {}), name))
    for tensor, entry in entries.items():
        problem = _entry_problem(tensor, entry, size - begin)
        if problem:
            findings.append(_bad_entry(name, tensor, *problem))
        else:
            start, end = entry["data_offsets"]
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            tensors[tensor] = TensorInfo(name, dtype, shape, begin + start, begin + end)
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    # With an entry left out its bytes would be reported again, as a hole.
    findings += [] if findings else _check_tiling(ordered, name, begin, size)
    if findings:
        raise CheckpointError(folder, findings)
    return ordered


def _read_text(folder: Path, name: str) -> tuple[bytes, int]:
    """The header's JSON text and the size of the whole file."""
    with open_regular(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, MAX_JSON_BYTES):
                raise _bad_length(folder, name, length, size)
            text = file.read(length)
        except OSError as error:
            raise _bad_text(folder, name, f"an error ({error.strerror})") from error
    if len(text) < length:
        raise _bad_text(folder, name, f"{len(text)} of {length} bytes")
    if not text.startswith(b"{"):
        raise _bad_text(folder, name, f"a text that starts with {text[:8]!r}")
    return text, size


def _bad_length(folder: Path, name: str, length: int, size: int) -> CheckpointError:
    if size < _LENGTH_BYTES:
        found, wanted = f"a file of {size} bytes", f"at least {_LENGTH_BYTES} bytes"
    else:
        found = f"a header of {length} bytes in a file of {size} bytes"
        wanted = f"a header inside the file and of at most {MAX_JSON_BYTES} bytes"
    return refuse(
        folder,
        "header-length",
        "the file is cut off or is no safetensors file",
        file=name,
        found=found,
        wanted=wanted,
        remedy=f"{DOWNLOAD_AGAIN} Files of other kinds (.bin, .pt, .gguf) are not read.",
    )


def _bad_text(folder: Path, name: str, found: str) -> CheckpointError:
    return refuse(
        folder,
        "header-invalid",
        "the header of the safetensors file cannot be read",
        file=name,
        found=found,
        wanted="a JSON object",
        remedy=DOWNLOAD_AGAIN,
    )


def _check_metadata(metadata: Any, name: str) -> Iterator[Finding]:
    if isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()):
        return
    yield Finding(
        "header-metadata",
        f"the header's {_METADATA} is malformed",
        found="values that are not strings",
        wanted="an object of strings",
        remedy=DOWNLOAD_AGAIN,
        file=name,
    )


def _entry_problem(tensor: str, entry: Any, data_size: int) -> tuple[str, str] | None:
    """What is wrong with one entry, as (found, wanted)."""
    if not _is_text(tensor):
        return "a name that is not valid Unicode", "a name"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "other fields", "exactly dtype, shape and data_offsets"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        return f"the dtype {brief(entry['dtype'])}", f"one of {', '.join(DTYPES)}"
    if not _are_sizes(entry["shape"]) or len(entry["shape"]) > _MAX_DIMENSIONS:
        return f"the shape {brief(entry['shape'])}", (
            f"a list of at most {_MAX_DIMENSIONS} integers, none negative"
        )
    offsets = entry["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= data_size:
        return f"the byte range {brief(offsets)}", f"a range inside {data_size} bytes of data"
    if math.prod(max(size, 1) for size in entry["shape"]) > _MAX_ELEMENTS:
        return f"the shape {brief(entry['shape'])}", "fewer than 2**63 elements"
    needed = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
    if offsets[1] - offsets[0] != needed:
        return f"{offsets[1] - offsets[0]} bytes", (
            f"{needed} bytes for the shape {tuple(entry['shape'])} of {entry['dtype']}"
        )
    return None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_sizes(value: Any) -> bool:
    # type() and not isinstance: True is an int for Python and not a size.
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _bad_entry(name: str, tensor: str, found: str, wanted: str) -> Finding:
    return Finding(
        "header-entry",
        "the header describes a tensor that cannot be there",
        found=found,
        wanted=wanted,
        remedy=DOWNLOAD_AGAIN,
        file=name,
        tensor=tensor,
    )


def _check_tiling(
    ordered: Mapping[str, TensorInfo], name: str, begin: int, size: int
) -> list[Finding]:
    """Overlaps, holes and bytes left over."""
    findings = []
    position = begin
    for tensor, info in ordered.items():
        if info.start != position:
            what = "overlaps" if info.start < position else "leaves a hole after"
            findings.append(_gap(f"the data of a tensor {what} the one before it", name, tensor))
        position = max(position, info.end)
    if position != size:
        findings.append(_gap(f"{size - position} bytes at the end belong to no tensor", name, None))
    return findings


def _gap(what: str, name: str, tensor: str | None) -> Finding:
    return Finding(
        "header-ranges",
        what,
        wanted="tensors that follow each other without gaps up to the end of the file",
        remedy=DOWNLOAD_AGAIN,
        file=name,
        tensor=tensor,
    )
