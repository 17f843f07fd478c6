"""The choice that launches use: the closed form's, or one measured to be faster with the same bits.

Measured winners come from two files of the device (:mod:`mokernels.ops.table_files`): one that this
package ships, and one in the user's cache folder, which ``mokernels tune`` writes and which counts
more. They are read once in a process, at the first launch on a device, never at import; then a
choice is one look-up in a dictionary. A winner counts only if it may stand in for what the closed
form chooses today (:func:`mokernels.ops.candidates.objection`): no file can change a bit of a
result. Batch-invariant launches use the closed form alone.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mokernels.ops import configs
from mokernels.ops.candidates import FREE_FIELDS, objection
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.kinds import Kind
from mokernels.ops.table_files import Key, Table, TableError, file_name, read_table
from mokernels.ops.target import Target
from mokernels.settings import cache_folder

logger = logging.getLogger("mokernels")

CLOSED_FORM = "closed form"
SHIPPED_FOLDER = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Choice:
    """A configuration, and where it comes from.

    Attributes:
        config: how the product is launched.
        source: :data:`CLOSED_FORM`, or the file that it was read from.
    """

    config: GemmConfig
    source: str = CLOSED_FORM


def choose(
    kind: Kind,
    m: int,
    n: int,
    k: int,
    target: Target,
    plan_n: int = 0,
    invariant: bool = False,
) -> GemmConfig:
    """As :func:`mokernels.ops.configs.choose`, with the same bits, and measured where it was."""
    if invariant:
        return configs.choose(kind, m, n, k, target, plan_n, invariant)
    return _chosen(kind, configs.bucket(m), plan_n or n, k, target).config


def choice_of(key: Key, target: Target) -> Choice:
    """What is launched for a product, and from where."""
    return _chosen(*key, target)


def tables_of(target: Target) -> tuple[tuple[Path, Table], ...]:
    """The files of a device that can be read, the user's first."""
    return _tables(target.device, target.name) if target.device else ()


def user_file(device: str) -> Path:
    """Where the user's measurements of a device are kept."""
    return cache_folder() / "tuned" / file_name(device)


def edition() -> int:
    """Another number whenever what is chosen may have changed."""
    return _edition


def forget() -> None:
    """Read the files again at the next launch, for after they have changed."""
    _choose_again()
    _tables.cache_clear()
    _warned.clear()


@contextmanager
def forced(key: Key, config: GemmConfig) -> Iterator[None]:
    """Launch one product with this configuration, on every device: for measuring it.

    Raises:
        ValueError: another product is being forced; there is one clock.
    """
    if not _forcing.acquire(blocking=False):
        raise ValueError("two configurations cannot be forced at once: measure one by one")
    try:
        _forced[key] = config
        _choose_again()
        yield
    finally:
        _forced.clear()
        _choose_again()
        _forcing.release()


_forced: dict[Key, GemmConfig] = {}
_forcing = threading.Lock()
_warned: set[Path] = set()
_edition = 0


def _choose_again() -> None:
    global _edition
    _edition += 1
    _chosen.cache_clear()


@cache
def _chosen(kind: Kind, rows: int, n: int, k: int, target: Target) -> Choice:
    key = Key(kind, rows, n, k)
    if key in _forced:
        return Choice(_forced[key], "forced")
    base = configs.choose(kind, rows, n, k, target)
    for path, table in tables_of(target):
        winner = table.winners.get(key)
        if winner is None:
            continue
        reason = objection(winner.config, base, kind, target)
        if reason is None:
            free = {name: getattr(winner.config, name) for name in FREE_FIELDS}
            if winner.config.tma and not base.tma:
                free |= {"tma": True, "swap": False}
            return Choice(replace(base, **free), str(path))
        _warn_of(path, key, reason)
    return Choice(base)


@cache
def _tables(device: str, capability: str) -> tuple[tuple[Path, Table], ...]:
    found = []
    for path in _files_of(device):
        try:
            table = read_table(path)
        except TableError as error:
            logger.warning("%s Until then the closed form chooses.", error)
            continue
        if (table.device, table.capability) == (device, capability):
            found.append((path, table))
        else:
            logger.warning(
                "The file of measured configurations %r is not used: it is of %s (%s), and this "
                "device is %s (%s). Delete it, and run `mokernels tune` to measure again.",
                *(str(path), table.device, table.capability, device, capability),
            )
    return tuple(found)


def _files_of(device: str) -> list[Path]:
    files = [SHIPPED_FOLDER / file_name(device)]
    with suppress(RuntimeError):  # an account without a home has no files in it
        files.insert(0, user_file(device))
    return [path for path in files if os.path.exists(path)]


def _warn_of(path: Path, key: Key, reason: str) -> None:
    if path in _warned:
        return
    _warned.add(path)
    logger.warning(
        "The file of measured configurations %r has an entry that is not used, %s: %s. The closed "
        "form chooses instead, here and for other such entries of the file. Measure them again "
        "with `mokernels tune`, or delete the file.",
        *(str(path), key, reason),
    )
