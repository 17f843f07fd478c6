"""A picture of a comparison: the SQNR of every layer."""

from __future__ import annotations

import math
import re
from pathlib import Path

from mokernels.errors import ArgumentError, MissingDependencyError
from mokernels.evaluate.compare import Comparison
from mokernels.evaluate.weights import LayerError

_NUMBER = re.compile(r"\.(\d+)\.")


def require_matplotlib() -> None:
    """Raise MissingDependencyError if there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "A plot needs the package matplotlib, which is not installed. Install it with "
            '`pip install "mokernels[plot]"`, or leave --plot out.'
        ) from error


def plot(comparison: Comparison, path: Path) -> None:
    """Write a picture: SQNR over the depth of the model, a line for each kind of projection.

    Args:
        comparison: with weights.
        path: of the file; its suffix says the format (.png, .svg, .pdf).

    Raises:
        MissingDependencyError: there is no matplotlib.
        ArgumentError: nothing to plot, or a suffix that matplotlib does not know.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = comparison.weights.layers if comparison.weights else ()
    shown = [layer for layer in layers if math.isfinite(layer.sqnr)]
    if not shown:
        raise ArgumentError("There is nothing to plot: no layer differs, or none was compared.")
    figure = Figure(figsize=(9, 5), layout="constrained")
    known = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in known:
        raise ArgumentError(
            f"The plot's file is {path.name!r}, wanted a suffix of {', '.join(known)}."
        )
    axes = figure.subplots()
    for kind, points in sorted(curves(shown).items()):
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=kind)
    axes.set(xlabel="decoder layer", ylabel="SQNR of the weight, dB", title=_title(comparison))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)


def curves(layers: list[LayerError]) -> dict[str, list[tuple[int, float]]]:
    """(decoder layer, SQNR) of each kind of projection; what is outside of them comes last."""
    numbers = [_NUMBER.search(layer.name) for layer in layers]
    behind = 1 + max((int(found[1]) for found in numbers if found), default=-1)
    points: dict[str, list[tuple[int, float]]] = {}
    for layer, found in zip(layers, numbers, strict=True):
        place = int(found[1]) if found else behind
        points.setdefault(layer.name.rpartition(".")[2], []).append((place, layer.sqnr))
    return points


def _title(comparison: Comparison) -> str:
    names = Path(comparison.b).name, Path(comparison.a).name
    text = "{} against {}".format(*names)
    if comparison.predictions is None:
        return text
    found = comparison.predictions
    return f"{text}\nperplexity x {found.ratio:.4f}, KL {found.kl:.4f}, same {found.agreement:.1%}"
