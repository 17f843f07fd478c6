"""What the demo prints: steps with a progress bar, then tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from torch import nn

from mokernels.demo.flow import STRIDE, WINDOW, Measured, Outcome
from mokernels.formats import FORMATS, Activation, Format, Granularity
from mokernels.layers.explain import kernel_family
from mokernels.layers.swap import make_layer
from mokernels.ptq.convert import is_calibrated

_ACTIVATIONS = {
    Activation.NONE: "16 bit",
    Activation.FP8_STATIC: "E4M3, one calibrated scale",
    Activation.FP8_PER_TOKEN: "E4M3, a scale per token",
    Activation.FP8_BLOCK: "E4M3, a scale per 128",
    Activation.NVFP4: "E2M1, a scale per 16",
    Activation.MXFP8: "E4M3, a scale per 32",
}


class RichReporter:
    """Shows each step of the flow with a bar and the time that it took."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[int, int], None]]:
        """One line; the bar pulses until the step reports numbers."""
        columns = (
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]left[/]"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(title.ljust(50), total=None)

            def advance(done: int, total: int) -> None:
                progress.update(task, completed=done, total=total)

            yield advance
            progress.update(task, completed=1, total=1)


def print_outcome(console: Console, outcome: Outcome, format: Format, device: str) -> None:
    """Everything that the demo found out, as tables."""
    console.print(formats_table(device))
    console.print(Panel(outcome.original.answer, title="original model", title_align="left"))
    console.print(Panel(outcome.quantized.answer, title=format.name, title_align="left"))
    console.print(comparison_table(outcome, format))
    seconds = sum(outcome.seconds.values())
    console.print(
        f"{outcome.layers} layers quantized to {format.name}; perplexity of "
        f"{outcome.original.perplexity.tokens} tokens in windows of {WINDOW}, stride {STRIDE}; "
        f"{seconds:.0f} s in total."
    )
    if not outcome.text_pinned:
        console.print(
            "This Python's documentation is worded differently from 3.11 to 3.13's, which the "
            "text is taken from: compare the two perplexities with each other only."
        )


def comparison_table(outcome: Outcome, format: Format) -> Table:
    """Sizes, speed and perplexity of the two models."""
    table = Table(title="before and after", title_justify="left")
    table.add_column("")
    for name in ("original", format.name, "ratio"):
        table.add_column(name, justify="right")
    before, after = outcome.original, outcome.quantized
    for name, value, digits in (
        ("size, MB", _megabytes, 1),
        ("perplexity", _perplexity, 3),
        ("tokens per second", _speed, 1),
    ):
        old, new = value(before), value(after)
        ratio = f"{new / old:.4f}" if old else "-"
        row = [f"{old:.{digits}f}", f"{new:.{digits}f}", ratio]
        table.add_row(name, *row, style="" if name != "perplexity" else _verdict(outcome))
    return table


def _verdict(outcome: Outcome) -> str:
    return "green" if outcome.ratio <= outcome.limit else "red"


def _megabytes(model: Measured) -> float:
    return model.nbytes / 1e6


def _perplexity(model: Measured) -> float:
    return model.perplexity.value


def _speed(model: Measured) -> float:
    return model.tokens_per_second


def formats_table(device: str) -> Table:
    """Every format: what it stores and what this machine would run."""
    table = Table(title=f"formats, on {device}", title_justify="left")
    for name in ("format", "weights", "scales", "activations", "calibration", "runs as"):
        table.add_column(name)
    for row in FORMATS.values():
        needed = "required" if is_calibrated(row) else "none"
        kernel, why = kernel_of(row, torch.device(device))
        cells = (weights_of(row), scales_of(row), _ACTIVATIONS[row.activation], needed)
        table.add_row(row.name, *cells, f"{kernel}: {why}")
    return table


def weights_of(format: Format) -> str:
    """The element type and its size."""
    return f"{format.element.name}, {8 // format.element.per_item} bit"


def scales_of(format: Format) -> str:
    """The scales of a weight, in words."""
    kinds = {
        Granularity.TENSOR: "one per weight",
        Granularity.CHANNEL: "one per output",
        Granularity.BLOCK: "one per 128x128",
        Granularity.GROUP: f"one per {format.group_size}",
    }
    names = {torch.uint8: "E8M0", torch.float8_e4m3fn: "E4M3", torch.float32: "fp32"}
    text = f"{names[format.scale_dtype]}, {kinds[format.granularity]}"
    return f"{text}; fp32, one per weight" if format.second_scale else text


def kernel_of(format: Format, device: torch.device) -> tuple[str, str]:
    """Which kernels would run a layer of ``format`` on ``device``, and why."""
    linear = nn.Linear(128, 128, bias=False, device="meta")
    return kernel_family(make_layer(linear, format), device)
