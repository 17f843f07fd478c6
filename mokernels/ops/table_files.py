"""Files of measured launch configurations: JSON, one for each kind of GPU.

::

    {"schema": 1, "device": "NVIDIA H100 80GB HBM3", "capability": "sm_90",
     "torch": "2.11.0", "triton": "3.6.0", "date": "2026-01-31",
     "entries": [{"kind": "fp8", "rows": 16, "n": 6144, "k": 4096,
                  "config": {"block_m": 16, "block_n": 64, ...},
                  "us": 9.1, "closed_form_us": 9.9}]}

``rows`` is the upper end of the range of M, null for the last one, which has none; ``n`` the rows
of the weight, or of the fused group. ``config`` holds every field of a GemmConfig. Nothing that is
read is run: a file can hold numbers and names only, and what they mean is checked where they are
used (:mod:`mokernels.ops.tuned`).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from mokernels.errors import MokernelsError
from mokernels.ops.config_tables import ANY_M
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.kinds import Kind

SCHEMA = 1
"""Version of the layout of these files."""
LARGEST_FILE = 16 * 2**20
"""Bytes; a file of every shape of a hundred models has a tenth of them."""
_LARGEST_NUMBER = 2**40
_WORDS = ("device", "capability", "torch", "triton", "date")
_KINDS = {kind.value: kind for kind in Kind}


class TableError(MokernelsError, ValueError):
    """A file of measured configurations cannot be read; the message names it."""


class Key(NamedTuple):
    """Which product a configuration is for.

    Attributes:
        kind: what is multiplied.
        rows: upper end of the range of M, from :func:`mokernels.ops.configs.bucket`.
        n: rows of the weight, or of the fused group.
        k: elements that are summed.
    """

    kind: Kind
    rows: int
    n: int
    k: int

    def __str__(self) -> str:
        rows = "more rows" if self.rows == ANY_M else f"up to {self.rows} rows"
        return f"{self.kind.value} {self.n}x{self.k}, {rows}"


@dataclass(frozen=True)
class Winner:
    """The fastest configuration that was found for a product.

    Attributes:
        config: all of it; what tuning may not change is there to be compared.
        us: microseconds of one call.
        closed_form_us: the same of the closed form's choice, in the same run.
    """

    config: GemmConfig
    us: float
    closed_form_us: float


@dataclass(frozen=True)
class Table:
    """What one file holds.

    Attributes:
        device: its name, as the driver gives it.
        capability: ``sm_90``, ``gfx942``.
        torch: version that it was measured with.
        triton: likewise.
        date: of the last measurement, year-month-day.
        winners: by product.
    """

    device: str
    capability: str
    torch: str
    triton: str
    date: str
    winners: Mapping[Key, Winner] = field(default_factory=dict)

    @property
    def origin(self) -> tuple[str, str, str, str]:
        """What measurements of one file have in common."""
        return self.device, self.capability, self.torch, self.triton


def file_name(device: str) -> str:
    """``nvidia-h100-80gb-hbm3.json``: the file of a device."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{slug or 'device'}.json"


def read_table(path: Path) -> Table:
    """Read a file.

    Raises:
        TableError: it cannot be read, or holds something else.
    """
    try:
        data = _parsed(path)
        _require(isinstance(data, dict), "found no object at the top, wanted one")
        found = data.get("schema")
        _require(found == SCHEMA, f"found schema {_shown(found)}, wanted {SCHEMA}")
        words = {name: _text(data, name) for name in _WORDS}
        entries = data.get("entries")
        _require(isinstance(entries, list), "found no list 'entries', wanted one")
        winners = dict(_entry(number, entry) for number, entry in enumerate(entries))
    except (_WrongFileError, OSError, ValueError, RecursionError) as error:
        raise TableError(
            f"The file of measured configurations {str(path)!r} cannot be used: {_reason(error)}. "
            "Delete it, and run `mokernels tune` to measure again."
        ) from error
    return Table(**words, winners=winners)


def write_table(path: Path, table: Table) -> None:
    """Write a file in one step: whoever reads meanwhile finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    words = {name: getattr(table, name) for name in _WORDS}
    entries = [_written(key, winner) for key, winner in sorted(table.winners.items(), key=_order)]
    text = json.dumps({"schema": SCHEMA, **words, "entries": entries}, indent=1)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.stem, suffix=".part", encoding="utf-8", delete=False
    ) as file:
        try:
            file.write(text + "\n")
            file.close()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


class _WrongFileError(Exception):
    """What is wrong, as a clause."""


def _parsed(path: Path) -> Any:
    # A pipe or a device would be read for ever.
    _require(path.is_file(), "it is no regular file")
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    _require(len(content) <= LARGEST_FILE, f"it has more than {LARGEST_FILE} bytes")
    return json.loads(content.decode("utf-8"))


def _reason(error: BaseException) -> str:
    if isinstance(error, RecursionError):
        return "it nests too deeply"
    if isinstance(error, (UnicodeDecodeError, json.JSONDecodeError)):
        return f"it is not JSON ({error})"
    return str(error).rstrip(".")


def _entry(number: int, entry: Any) -> tuple[Key, Winner]:
    place = f"entry {number}"
    _require(isinstance(entry, dict), f"{place} is no object")
    kind = entry.get("kind")
    _require(isinstance(kind, str) and kind in _KINDS, f"{place} has the kind {_shown(kind)}")
    rows = ANY_M if entry.get("rows", 0) is None else _integer(entry, "rows", place)
    n, k = _integer(entry, "n", place), _integer(entry, "k", place)
    config = entry.get("config")
    _require(isinstance(config, dict), f"{place} has no object 'config'")
    times = [_seconds(entry, name, place) for name in ("us", "closed_form_us")]
    return Key(_KINDS[kind], rows, n, k), Winner(_config(config, place), *times)


def _config(entry: dict[str, Any], place: str) -> GemmConfig:
    names = {f.name for f in fields(GemmConfig)}
    missing, strange = sorted(names - entry.keys()), sorted(entry.keys() - names)
    _require(not missing, f"the config of {place} lacks {', '.join(missing)}")
    _require(not strange, f"the config of {place} has {_shown(strange[:1])}, which means nothing")
    return GemmConfig(**{name: _field(entry[name], name, place) for name in names})


def _field(value: Any, name: str, place: str) -> Any:
    if isinstance(value, bool) or value is None or (isinstance(value, str) and len(value) < 40):
        return value
    _require(_is_number(value), f"{name} of {place} is {_shown(value)}, wanted a small number")
    return value


def _integer(entry: dict[str, Any], name: str, place: str) -> int:
    value = entry.get(name)
    _require(_is_number(value), f"{name} of {place} is {_shown(value)}, wanted a number above 0")
    return int(value)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 < value < _LARGEST_NUMBER


def _seconds(entry: dict[str, Any], name: str, place: str) -> float:
    value = entry.get(name)
    good = type(value) in (int, float) and 0 < value < _LARGEST_NUMBER  # type: ignore[operator]
    _require(good, f"{name} of {place} is {_shown(value)}, wanted microseconds")
    return float(value)  # type: ignore[arg-type]


def _text(data: dict[str, Any], name: str) -> str:
    value = data.get(name)
    _require(isinstance(value, str) and len(value) < 200, f"{name} is {_shown(value)}, wanted text")
    return str(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _WrongFileError(otherwise)


def _written(key: Key, winner: Winner) -> dict[str, Any]:
    rows = None if key.rows == ANY_M else key.rows
    return {
        "kind": key.kind.value,
        "rows": rows,
        "n": key.n,
        "k": key.k,
        "config": asdict(winner.config),
        "us": round(winner.us, 3),
        "closed_form_us": round(winner.closed_form_us, 3),
    }


def _order(item: tuple[Key, Winner]) -> tuple[str, int, int, int]:
    key = item[0]
    return key.kind.value, key.n, key.k, key.rows
