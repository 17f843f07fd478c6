"""Folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mokernels.errors import CheckpointError, Finding


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which gets the name ``target`` when the context ends without an error.

    Until then it lies beside ``target`` under a name that no loader takes for a checkpoint; after
    an error it is removed.

    Args:
        target: must not exist, or be an empty folder; its parent has to exist.

    Raises:
        CheckpointError: the target exists and is not empty.
        OSError: the disk is full, the parent does not exist, ...
    """
    _refuse_occupied(target)
    partial = target.absolute().parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    partial.mkdir()
    try:
        yield partial
        for file in partial.iterdir():
            sync_file(file)
        sync_folder(partial)
        os.rename(partial, target)
        sync_folder(target.absolute().parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_occupied(target: Path) -> None:
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(
            target,
            [
                Finding(
                    "folder-occupied",
                    "the folder to write exists already",
                    found="files in it" if target.is_dir() else "a file",
                    wanted="no such folder, or an empty one",
                    remedy="Choose another name, or remove the folder; nothing is overwritten.",
                )
            ],
        )


def write_json(folder: Path, name: str, value: Mapping[str, Any]) -> None:
    """Write a JSON file as ModelOpt and transformers indent it, to the disk."""
    write_bytes(folder / name, json.dumps(value, indent=4).encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file, to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on the disk."""
    # Opening a folder works on POSIX alone; elsewhere renames are not synced one by one.
    if os.name == "posix":
        sync_file(folder)
