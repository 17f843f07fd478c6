"""The result of an audit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from mokernels.checkpoint.plan import CheckpointPlan
from mokernels.errors import CheckpointError, Finding, UnsupportedFormatError

_UNSUPPORTED = frozenset({"format-unsupported", "method-unsupported"})


@dataclass(frozen=True)
class Report:
    """What an audit found; ``str(report)`` is a readable page.

    Attributes:
        path: the checkpoint's folder.
        findings: everything that is wrong or odd.
        plan: what the checkpoint holds; without layers when its files could not be read.
        values: which tensors were read: ``"all"``, ``"scales"`` or ``"none"``.
        files: names of the safetensors files.
        tensors: number of tensors.
        nbytes: bytes of all tensors.
    """

    path: str
    findings: tuple[Finding, ...]
    plan: CheckpointPlan
    values: str = "none"
    files: tuple[str, ...] = ()
    tensors: int = 0
    nbytes: int = 0

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that stop a load."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Findings that are only told."""
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def ok(self) -> bool:
        """Whether the checkpoint can be loaded."""
        return not self.errors

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of quantized layers by name of the format."""
        return Counter(layer.format.name for layer in self.plan.layers)

    @property
    def quantized_nbytes(self) -> int:
        """Bytes of the quantized layers."""
        return sum(layer.nbytes for layer in self.plan.layers)

    def require(self) -> CheckpointPlan:
        """The plan of a checkpoint without errors.

        Raises:
            UnsupportedFormatError: the only errors are that this version does not run the format.
            CheckpointError: there are errors; it carries all of them.
        """
        if self.ok:
            return self.plan
        unsupported = all(finding.rule in _UNSUPPORTED for finding in self.errors)
        raise (UnsupportedFormatError if unsupported else CheckpointError)(self.path, self.errors)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self._verdict()}", *self._contents()]
        lines += [f"  error [{finding.rule}] {finding}" for finding in self.errors]
        lines += [f"  warning [{finding.rule}] {finding}" for finding in self.warnings]
        return "\n".join(lines)

    def _verdict(self) -> str:
        errors, warnings = len(self.errors), len(self.warnings)
        if not errors and not warnings:
            return "ok"
        return f"{'not ok' if errors else 'ok'}, {_plural(errors, 'error')}, " + _plural(
            warnings, "warning"
        )

    def _contents(self) -> list[str]:
        layers = [f"{_plural(count, 'layer')} of {name}" for name, count in self.counts.items()]
        activations = sorted({layer.activation.value for layer in self.plan.layers})
        lines = [
            f"  {', '.join(layers) or 'no quantized layer'}"
            + (f" (activations: {', '.join(activations)})" if activations else ""),
            f"  {_plural(self.tensors, 'tensor')} in {_plural(len(self.files), 'file')}, "
            f"{self.nbytes:,} bytes, {self.quantized_nbytes:,} of them quantized",
        ]
        scales = {"all": "all values", "scales": "the scales", "none": "no values"}
        return [*lines, f"  read: {scales.get(self.values, self.values)}"] if self.files else []


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
