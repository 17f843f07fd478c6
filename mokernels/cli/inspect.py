"""``mokernels inspect``: what a checkpoint holds, from its JSON files and headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mokernels.checkpoint import LayerPlan, Report, TensorInfo, audit, open_checkpoint

_SHOWN_NAMES = 6


@dataclass(frozen=True)
class Share:
    """One kind of tensors: how many, how large."""

    kind: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's headers, audited.

    Attributes:
        report: the audit, without values.
        tensors: every tensor by name.
    """

    report: Report
    tensors: dict[str, TensorInfo]

    @property
    def shares(self) -> tuple[Share, ...]:
        """The tensors by kind; every tensor belongs to exactly one."""
        plan = self.report.plan
        groups: dict[str, list[TensorInfo]] = {
            "quantized weights": [layer.tensors["weight"] for layer in plan.layers],
            "their scales": [info for layer in plan.layers for info in scales(layer)],
            "their biases": [layer.bias for layer in plan.layers if layer.bias],
            "KV-cache scales": [info for kept in plan.kv_scales.values() for info in kept.values()],
            "not quantized": [self.tensors[name] for name in plan.plain],
        }
        return tuple(
            Share(kind, len(infos), sum(info.nbytes for info in infos))
            for kind, infos in groups.items()
            if infos
        )


def scales(layer: LayerPlan) -> list[TensorInfo]:
    """The scales of a layer."""
    return [info for leaf, info in layer.tensors.items() if leaf != "weight"]


def summarize(folder: Path) -> Inspection:
    """Read a checkpoint's JSON files and headers.

    Raises:
        CheckpointError: they cannot be read, or name a format that this version does not run.
    """
    with open_checkpoint(folder) as checkpoint:
        return Inspection(audit(checkpoint, values="none"), dict(checkpoint.tensors))


def print_inspection(console: Console, inspection: Inspection, *, layers: bool) -> None:
    """The tables; ``layers`` adds one row for each layer and each other tensor."""
    console.print(config_table(inspection.report))
    console.print(shares_table(inspection))
    if inspection.report.plan.layers:
        console.print(formats_table(inspection.report.plan.layers))
    if layers:
        console.print(layers_table(inspection))
    problems = len(inspection.report.errors)
    if problems:
        console.print(
            f"{problems} problem{'s' * (problems != 1)}: this checkpoint does not load. "
            f"`mokernels check {inspection.report.path}` says why.",
            style="red",
            markup=False,
            soft_wrap=True,
        )


def config_table(report: Report) -> Table:
    """What the JSON files say."""
    config = report.plan.config
    table = Table(title=report.path, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = (
        ("producer", f"modelopt {config.producer}" if config.producer else "not said"),
        ("algorithm", config.algorithm or "none"),
        ("KV cache", config.kv_cache or "not quantized"),
        ("group size", str(config.group_size or "-")),
        ("excluded", _some(config.exclude)),
        ("said in", ", ".join(config.files) or "no file"),
        ("weights in", _some(report.files)),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def _some(names: Sequence[str]) -> str:
    text = ", ".join(names[:_SHOWN_NAMES]) or "nothing"
    more = len(names) - _SHOWN_NAMES
    return f"{text} and {more} more" if more > 0 else text


def shares_table(inspection: Inspection) -> Table:
    """Bytes by kind."""
    table = Table(title="tensors", title_justify="left")
    table.add_column("kind")
    for name in ("tensors", "bytes", "share"):
        table.add_column(name, justify="right")
    total = inspection.report.nbytes
    for share in inspection.shares:
        part = f"{share.nbytes / max(total, 1):.1%}"
        table.add_row(share.kind, str(share.tensors), f"{share.nbytes:,}", part)
    table.add_section()
    table.add_row("all", str(inspection.report.tensors), f"{total:,}", "")
    return table


def formats_table(layers: Sequence[LayerPlan]) -> Table:
    """Layers by format and treatment of the activations."""
    table = Table(title="quantized layers", title_justify="left")
    table.add_column("format")
    table.add_column("activations")
    for name in ("layers", "weights", "bits per weight"):
        table.add_column(name, justify="right")
    kinds = sorted({(layer.format.name, layer.activation.value) for layer in layers})
    for kind in kinds:
        group = [row for row in layers if (row.format.name, row.activation.value) == kind]
        count = sum(row.n * row.k for row in group)
        bits = 8 * sum(info.nbytes for row in group for info in row.tensors.values()) / count
        table.add_row(*kind, str(len(group)), f"{count:,}", f"{bits:.2f}")
    return table


def layers_table(inspection: Inspection) -> Table:
    """One row for each quantized layer, then one for each tensor that is not quantized."""
    table = Table(title="layers", title_justify="left")
    table.add_column("layer or tensor", overflow="fold")
    table.add_column("format")
    table.add_column("shape")
    table.add_column("activations")
    table.add_column("bytes", justify="right")
    for row in _layer_rows(inspection):
        table.add_row(*row)
    table.add_section()
    for name in inspection.report.plan.plain:
        info = inspection.tensors[name]
        shape = _shape(info.shape)
        table.add_row(name, str(info.dtype).removeprefix("torch."), shape, "", f"{info.nbytes:,}")
    return table


def _layer_rows(inspection: Inspection) -> Iterator[tuple[str, ...]]:
    for layer in inspection.report.plan.layers:
        shape = _shape((layer.n, layer.k))
        yield (
            layer.name,
            layer.format.name,
            f"{shape}, bias" if layer.bias else shape,
            layer.activation.value,
            f"{layer.nbytes:,}",
        )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) if math.prod(shape) != 1 or shape else "scalar"
