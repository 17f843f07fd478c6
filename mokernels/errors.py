"""Every failure that a user can meet, as a sentence: what, where, found, wanted, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


class MokernelsError(Exception):
    """Base of every error that mokernels raises on purpose."""


class ArgumentError(MokernelsError, ValueError):
    """An operator or function was called with a tensor or option that it cannot take."""


class BackendError(MokernelsError, RuntimeError):
    """No kernel can run this call on this device; the message says which devices can."""


class CalibrationError(MokernelsError, ValueError):
    """Calibration cannot give every layer a scale: no data, NaN, or a layer that saw none."""


class MissingDependencyError(MokernelsError, ImportError):
    """An optional package is needed for what was asked; the message says how to install it."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (or odd) about a checkpoint.

    Attributes:
        rule: short stable name of the rule, for example ``"scale-not-positive"``.
        what: the problem as a clause, for example ``"the weight scale is not positive"``.
        found: what the checkpoint holds.
        wanted: what a correct checkpoint holds.
        remedy: what the user can do.
        file: name of the file inside the checkpoint folder, if one is to blame.
        tensor: name of the tensor, if one is to blame.
        layer: name of the module, if one is to blame.
        severity: ``"error"`` stops a load; ``"warning"`` is only told.
    """

    rule: str
    what: str
    found: str = ""
    wanted: str = ""
    remedy: str = ""
    file: str | None = None
    tensor: str | None = None
    layer: str | None = None
    severity: Severity = "error"

    def __str__(self) -> str:
        where = ", ".join(
            f"{kind} {name!r}"
            for kind, name in (("file", self.file), ("tensor", self.tensor), ("layer", self.layer))
            if name
        )
        text = f"{self.what} ({where})" if where else self.what
        text += f": found {self.found}" if self.found else ""
        text += f", wanted {self.wanted}" if self.wanted else ""
        text = text.rstrip(".") + "."
        return f"{text} {self.remedy}".rstrip() if self.remedy else text


class CheckpointError(MokernelsError, ValueError):
    """A checkpoint is broken, contradictory or not supported; nothing of it was loaded.

    Attributes:
        path: the checkpoint's folder, as it was given.
        findings: everything that was found wrong, not only the first.
    """

    shown = 12

    def __init__(self, path: object, findings: Sequence[Finding]) -> None:
        self.path = str(path)
        self.findings = tuple(findings)
        count = len(self.findings)
        head = f"The checkpoint {self.path!r} was refused: {count} problem{'s' * (count != 1)}."
        lines = [f"  [{finding.rule}] {finding}" for finding in self.findings[: self.shown]]
        if count > self.shown:
            lines.append(f"  ... and {count - self.shown} more; `mokernels check` lists them all.")
        super().__init__("\n".join([head, *lines]))

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.path, self.findings))


class UnsupportedFormatError(CheckpointError):
    """The checkpoint names a quantization algorithm that this version does not run."""
