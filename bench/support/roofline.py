"""A picture of the rows that have a product: how far each is from the measured ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.support.machine import Ceilings, Machine
from bench.support.results import Row


def points(rows: Sequence[Row]) -> list[tuple[str, float, float]]:
    """(group, operations a byte, TFLOPS) of our contender in each row that has both."""
    found = []
    for row in rows:
        speed = row.speeds[row.ours]
        if speed.tflops and speed.gbps:
            found.append((row.group, 1000 * speed.tflops / speed.gbps, speed.tflops))
    return found


def plot(
    machine: Machine, rows: Sequence[Row], ceilings: Ceilings, folder: Path, part: str = ""
) -> Path:
    """Write ``<device>-<date><part>.png``; such a file is replaced."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensities = [0.5 * 2**step for step in range(15)]
    for unit, peak in ceilings.flops_per_second.items():
        roof = [min(peak, i * ceilings.bytes_per_second) / 1e12 for i in intensities]
        axes.loglog(intensities, roof, label=f"measured ceiling, {unit}")
    found = points(rows)
    for group in dict.fromkeys(name for name, _, _ in found):
        chosen = [(x, y) for name, x, y in found if name == group]
        axes.loglog(*zip(*chosen, strict=True), ".", label=group)
    axes.set(xlabel="operations a byte", ylabel="TFLOPS", title=f"{machine.device}, {machine.date}")
    axes.legend()
    file = folder / f"{machine.slug}{part}.png"
    figure.savefig(file, dpi=120)
    return file
