"""``mokernels compare``: the numbers, as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mokernels.evaluate import Comparison, LayerError, Predictions, WeightErrors

WORST = 10
"""Layers that are listed unless all are asked for."""


def read_text(path: Path | None) -> str | None:
    """Content of a text file; None for none."""
    return None if path is None else path.read_text(encoding="utf-8")


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """One bar for each step, made when it begins."""
    with Progress(console=console, transient=True) as bars:
        tasks: dict[str, object] = {}

        def advance(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done)  # type: ignore[arg-type]

        yield advance


def print_comparison(console: Console, found: Comparison, *, layers: bool) -> None:
    """The tables; ``layers`` lists every layer instead of the worst."""
    console.print(f"a: {found.a}\nb: {found.b}", markup=False, soft_wrap=True)
    if found.predictions is not None:
        console.print(predictions_table(found.predictions))
    if found.weights is None:
        return
    console.print(kinds_table(found.weights.layers))
    shown = found.weights.layers if layers else worst(found.weights.layers)
    console.print(layers_table(shown, complete=layers))
    console.print(others_line(found.weights), markup=False, soft_wrap=True)


def predictions_table(found: Predictions) -> Table:
    """Perplexities, divergence, agreement."""
    table = Table(
        title=f"predictions of {found.tokens} tokens, in windows of {found.window}",
        title_justify="left",
    )
    table.add_column("")
    for name in ("a", "b", "b / a"):
        table.add_column(name, justify="right")
    a, b = found.perplexities
    table.add_row("perplexity", f"{a:.3f}", f"{b:.3f}", f"{found.ratio:.4f}")
    table.add_row("KL of b from a, nats per token", "", f"{found.kl:.5f}", "")
    table.add_row("same likeliest token", "", f"{found.agreement:.2%}", "")
    return table


def kinds_table(layers: Sequence[LayerError]) -> Table:
    """SQNR by kind of projection, in the order of their first layer."""
    table = Table(title="SQNR of the weights, dB", title_justify="left")
    table.add_column("layers")
    table.add_column("a, b")
    for name in ("number", "lowest", "median", "highest"):
        table.add_column(name, justify="right")
    for kind in dict.fromkeys(map(_kind, layers)):
        group = [layer for layer in layers if _kind(layer) == kind]
        values = sorted(layer.sqnr for layer in group)
        chosen = values[0], values[len(values) // 2], values[-1]
        table.add_row(kind[0], ", ".join(kind[1]), str(len(group)), *map(_decibels, chosen))
    return table


def layers_table(layers: Sequence[LayerError], *, complete: bool) -> Table:
    """One row for each layer."""
    title = "every layer" if complete else f"the {len(layers)} layers with the lowest SQNR"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    table.add_column("a, b")
    table.add_column("shape")
    table.add_column("SQNR, dB", justify="right")
    for layer in layers:
        shape = " x ".join(map(str, layer.shape))
        table.add_row(layer.name, ", ".join(layer.formats), shape, _decibels(layer.sqnr))
    return table


def worst(layers: Sequence[LayerError]) -> list[LayerError]:
    """The layers with the lowest SQNR, the lowest first."""
    return sorted(layers, key=lambda layer: layer.sqnr)[:WORST]


def others_line(found: WeightErrors) -> str:
    """A sentence on what neither of the two quantizes."""
    count = len(found.differing)
    if not count:
        return f"The other {found.others} tensors are equal."
    names = ", ".join(found.differing[:WORST]) + (", ..." if count > WORST else "")
    return f"{count} of the other {found.others} tensors differ: {names}."


def _kind(layer: LayerError) -> tuple[str, tuple[str, str]]:
    return layer.name.rpartition(".")[2], layer.formats


def _decibels(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "equal" if value > 0 else "-inf"
