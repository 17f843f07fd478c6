"""Opening the files of a checkpoint folder that nobody has vouched for.

Only regular files with a plain name are opened. A name that leads out of the folder, a FIFO (which
would hang the reader), a device or a socket is refused before anything is read.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mokernels.errors import CheckpointError, Finding

MAX_JSON_BYTES = 100_000_000
"""Largest JSON text that is parsed: a file, or the header of a safetensors file."""

DOWNLOAD_AGAIN = "Download or copy the file again."
_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def refuse(folder: Path, rule: str, what: str, **details: str | None) -> CheckpointError:
    """The error for one finding; ``details`` are the fields of :class:`Finding`."""
    return CheckpointError(folder, [Finding(rule, what, **details)])  # type: ignore[arg-type]


def brief(value: object) -> str:
    """``repr(value)``, cut to a length that fits a sentence."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def checked_folder(path: str | os.PathLike[str]) -> Path:
    """``path`` as a Path.

    Raises:
        CheckpointError: it does not exist, or is a file.
    """
    folder = Path(path)
    wanted = "a folder with config.json and safetensors files"
    try:
        mode = os.stat(folder).st_mode
    except (OSError, ValueError) as error:
        raise refuse(
            folder,
            "folder-missing",
            "the folder cannot be opened",
            found=_reason(error),
            wanted=wanted,
            remedy="Check the path; a model of a hub has to be downloaded first.",
        ) from error
    if not stat.S_ISDIR(mode):
        raise refuse(
            folder,
            "folder-missing",
            "the path is not a folder",
            found=_kind(mode),
            wanted=wanted,
            remedy="Give the folder that holds the file.",
        )
    return folder


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is the name of a file in a folder and nothing more."""
    return name not in ("", ".", "..") and not any(mark in name for mark in ("/", "\\", "\0"))


def has_file(folder: Path, name: str) -> bool:
    """Whether the folder has an entry of that name, a broken link included."""
    return os.path.lexists(folder / name)


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Open the regular file ``name`` of ``folder`` for reading bytes.

    A symbolic link is followed when it ends in the same folder, or, in the layout of the Hugging
    Face hub's cache (``models--*/snapshots/<revision>/<name>``), in the same model's folder.

    Raises:
        CheckpointError: the name is no plain name, the file is missing or unreadable, leads out of
            the folder, or is not a regular file.
    """
    path = resolve(folder, name)
    try:
        # O_NONBLOCK: should a FIFO have taken the file's place since, opening it does not wait.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise _unreadable(folder, name, error) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise _not_regular(folder, name, mode)
    return os.fdopen(descriptor, "rb")


def resolve(folder: Path, name: str) -> Path:
    """The real path of the regular file ``name`` of ``folder``; raises as open_regular does."""
    if not is_plain_name(name):
        raise refuse(
            folder,
            "file-name",
            "a file name leads out of the folder",
            found=brief(name),
            wanted="the plain name of a file in the folder",
            remedy="Do not load this checkpoint unless you trust who made it.",
        )
    try:
        real = Path(os.path.realpath(folder / name, strict=True))
        mode = os.stat(real).st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(folder, name, error) from error
    root = _root(folder)
    if not real.is_relative_to(root):
        raise refuse(
            folder,
            "file-link",
            "a symbolic link leads out of the folder",
            file=name,
            found=repr(str(real)),
            wanted=f"a file inside {str(root)!r}",
            remedy="Copy the file to the folder, or give the folder that it is in.",
        )
    if not stat.S_ISREG(mode):
        raise _not_regular(folder, name, mode)
    return real


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in the file ``name`` of ``folder``.

    Raises:
        CheckpointError: the file cannot be opened, is too large or is not one JSON object.
    """
    with open_regular(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise refuse(
                folder,
                "json-size",
                "the JSON file is too large to be one of a checkpoint",
                file=name,
                found=f"{size} bytes",
                wanted=f"at most {MAX_JSON_BYTES}",
                remedy=DOWNLOAD_AGAIN,
            )
        try:
            data = file.read(MAX_JSON_BYTES)
        except OSError as error:
            raise _unreadable(folder, name, error) from error
    return parse_json(data, folder, name)


def parse_json(data: bytes, folder: Path, name: str) -> dict[str, Any]:
    """``data`` as one JSON object: UTF-8, no key twice, no NaN; else a CheckpointError."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except RecursionError:
        raise _not_json(folder, name, "lists or objects nested too deeply") from None
    except ValueError as error:
        raise _not_json(folder, name, _reason(error)) from error
    if not isinstance(value, dict):
        raise _not_json(folder, name, f"a {type(value).__name__} at the top")
    return value


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key!r} twice in one object")
        seen.add(key)
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"the number {name}, which JSON does not have")


def _root(folder: Path) -> Path:
    """The folder that a link may not leave."""
    real = Path(os.path.realpath(folder))
    for parent in real.parents:
        if parent.name.startswith("models--") and real.is_relative_to(parent / "snapshots"):
            return parent
    return real


def _kind(mode: int) -> str:
    return next((text for test, text in _KINDS if test(mode)), "a file")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _not_json(folder: Path, name: str, found: str) -> CheckpointError:
    return refuse(
        folder,
        "json-invalid",
        "the text is not valid JSON",
        file=name,
        found=found,
        wanted="one JSON object in UTF-8",
        remedy=DOWNLOAD_AGAIN,
    )


def _not_regular(folder: Path, name: str, mode: int) -> CheckpointError:
    return refuse(
        folder,
        "file-kind",
        "a file of the checkpoint is no regular file",
        file=name,
        found=_kind(mode),
        wanted="a regular file",
        remedy="Do not load this checkpoint unless you trust who made it.",
    )


def _unreadable(folder: Path, name: str, error: Exception) -> CheckpointError:
    missing = isinstance(error, FileNotFoundError)
    return refuse(
        folder,
        "file-missing" if missing else "file-unreadable",
        "a file of the checkpoint is missing" if missing else "a file cannot be read",
        file=name,
        found=_reason(error),
        wanted="a readable file",
        remedy="Download the checkpoint again." if missing else "Check the file's permissions.",
    )
