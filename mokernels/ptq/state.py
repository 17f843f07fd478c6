"""What calibration has seen so far, in a file from which an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mokernels.calibration.observers import AmaxObserver
from mokernels.errors import CalibrationError

_VERSION = 1
_SECONDS = 20.0
"""Between two writes; a batch takes seconds on a large model."""


class CalibrationState:
    """The file; without a path everything here does nothing.

    Args:
        path: of the file, which need not exist.
        fingerprint: of what is calibrated; see :func:`fingerprint`.
        observers: by name; restored from the file if it is there.

    Attributes:
        done: batches that the observers have seen.

    Raises:
        CalibrationError: the file is no such file, or belongs to something else.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        fingerprint: str,
        observers: Mapping[str, AmaxObserver],
    ) -> None:
        self.path = None if path is None else Path(path)
        self.done = 0
        self._fingerprint = fingerprint
        self._observers = observers
        self._written = time.monotonic()
        if self.path is not None and self.path.exists():
            self._restore(self.path)

    def advance(self, done: int) -> None:
        """Take note that ``done`` batches were seen; writes the file now and then."""
        self.done = done
        if time.monotonic() - self._written > _SECONDS:
            self.write()

    def write(self) -> None:
        """Write the file, all or nothing."""
        if self.path is None or not self.done:
            return
        value = {
            "version": _VERSION,
            "fingerprint": self._fingerprint,
            "batches": self.done,
            "observers": {name: each.state() for name, each in self._observers.items()},
        }
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        scratch.write_text(json.dumps(value))
        os.replace(scratch, self.path)
        self._written = time.monotonic()

    def _restore(self, path: Path) -> None:
        try:
            value = json.loads(path.read_text())
            found = value["version"], value["fingerprint"]
            states, done = dict(value["observers"]), int(value["batches"])
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(
                f"The file {str(path)!r} given as resume= is no state of a calibration ({error}). "
                "Remove it to begin anew, or give another name."
            ) from error
        if found != (_VERSION, self._fingerprint) or states.keys() != self._observers.keys():
            raise CalibrationError(
                f"The file {str(path)!r} given as resume= belongs to another model, configuration "
                "or version of mokernels. Remove it to begin anew, or give another name."
            )
        for name, state in states.items():
            self._observers[name].restore(state)
        self.done = done


def fingerprint(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """A digest of a model's class, its tensors' names and shapes, a few values, and settings."""
    digest = hashlib.sha256()
    digest.update(
        json.dumps([type(model).__name__, settings], sort_keys=True, default=str).encode()
    )
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        if not parameter.is_meta and parameter.numel():
            first = parameter.detach().flatten()[:4].float().cpu()
            digest.update(str(first.tolist()).encode())
    return digest.hexdigest()
