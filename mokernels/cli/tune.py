"""``mokernels tune``: measure launch configurations for a checkpoint, keep the winners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from mokernels.checkpoint import audit, open_checkpoint
from mokernels.errors import ArgumentError, MokernelsError
from mokernels.ops import tuned
from mokernels.ops.layer_kinds import kind_of_layer
from mokernels.ops.table_files import Key, Table, Winner, read_table, write_table
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, SM_90, Target, target_of
from mokernels.tuning import Bench, Job, Outcome, Product, jobs_for, products_of, search
from mokernels.tuning.device import DeviceBench, require_gpu

TARGETS = {target.name: target for target in (*CUDA_TARGETS, *HIP_TARGETS)}
SHOWN_REFUSALS = 5
WANTED_SHARE = 0.9
"""Of the best speed that is found: what the closed form is to reach everywhere."""


class TuneError(MokernelsError, RuntimeError):
    """Nothing could be measured."""


@dataclass
class Keeper:
    """Writes the file anew after each winner, so that an interrupted run loses nothing.

    Attributes:
        path: the file.
        table: what it holds.
    """

    path: Path
    table: Table

    def keep(self, key: Key, winner: Winner) -> None:
        """Add a winner, or replace the one of its product."""
        winners = {**self.table.winners, key: winner}
        self.table = replace(self.table, winners=winners, date=_today())
        write_table(self.path, self.table)


def products(folder: Path, activations: str) -> tuple[Product, ...]:
    """What a checkpoint multiplies, from its JSON files and headers alone.

    Raises:
        CheckpointError: the checkpoint does not load.
        ArgumentError: ``activations`` does not fit it.
    """
    with open_checkpoint(folder) as checkpoint:
        return products_of(audit(checkpoint, values="none").require(), activations)


def target_to_plan_for(dry_run: bool, device: str, name: str | None) -> Target:
    """The GPU's target; in a dry run the one named, or without a GPU Hopper's.

    Raises:
        ArgumentError: there is no target of that name, or one is named to be measured.
        BackendError: there is no GPU to measure.
    """
    if name is not None and not dry_run:
        raise ArgumentError(
            "--target plans for a GPU that need not be here, and what is not here cannot be "
            "measured. Add --dry-run, or leave it out."
        )
    if name is not None and name not in TARGETS:
        raise ArgumentError(f"--target is {name!r}, wanted one of {', '.join(TARGETS)}.")
    if name is not None:
        return TARGETS[name]
    if dry_run and not torch.cuda.is_available():
        return SM_90
    return target_of(require_gpu(device))


def print_plan(console: Console, found: Sequence[Product], target: Target) -> None:
    """Each product with its ranges of rows and its number of candidates."""
    table = RichTable(title=f"products on {target.name}", title_justify="left")
    for name in ("kind", "N x K"):
        table.add_column(name)
    for name in ("layers", "ranges of rows", "candidates"):
        table.add_column(name, justify="right")
    table.add_column("first layer", overflow="fold")
    jobs = jobs_for(found, target)
    for product in found:
        kind = kind_of_layer(product.format, product.activation, target)
        own = [j for j in jobs if j.key[0] is kind and j.key[2:] == (product.n, product.k)]
        counts = (product.layers, len(own), sum(len(job.candidates) for job in own))
        size = f"{product.n} x {product.k}"
        table.add_row(kind.value, size, *map(str, counts), product.example)
    console.print(table)
    total = sum(len(job.candidates) for job in jobs)
    console.print(f"{len(jobs)} choices, {total} candidates to compile and measure.")


def tune(
    found: Sequence[Product],
    device: str,
    output: Path | None,
    again: bool,
    console: Console,
    *,
    bench: Bench | None = None,
    target: Target | None = None,
) -> tuple[Path, Outcome, Table]:
    """Measure what has not been measured yet, with a bar that shows the time left.

    Args:
        found: from :func:`products`.
        device: ``auto`` or a CUDA device's name.
        output: the file to write; None for the user's own.
        again: measure also what the file holds already.
        console: of the bar.
        bench: in place of the device.
        target: of the bench.

    Returns:
        The file, what this run found, and what the file holds now.

    Raises:
        BackendError: there is no GPU.
        TableError: there is a file, and it cannot be read.
    """
    if bench is None:
        made = DeviceBench(require_gpu(device))
        bench, target = made, made.target
    assert target is not None
    path = output or tuned.user_file(target.device)
    keeper = Keeper(path, _table_to_continue(path, target, console))
    jobs = jobs_for(found, target, () if again else keeper.table.winners)
    outcome = _search_with_bar(jobs, bench, keeper, console)
    tuned.forget()
    return path, outcome, keeper.table


def print_outcome(console: Console, path: Path, outcome: Outcome, kept: Table) -> None:
    """What was found, what was left out, and where it is.

    Raises:
        TuneError: there was something to measure, and all of it failed.
    """
    if outcome.refused and not outcome.winners and not outcome.interrupted:
        raise TuneError(
            f"No configuration could be measured on {kept.device}: {outcome.refused[0]}. Run "
            "`python -m pytest tests/kernels` to see whether the kernels run here at all."
        )
    table = RichTable(title="winners", title_justify="left")
    for name in ("product", "tile", "warps", "stages"):
        table.add_column(name)
    for name in ("us", "closed form", "gain"):
        table.add_column(name, justify="right")
    for key, winner in outcome.winners.items():
        table.add_row(*_cells(key, winner))
    if outcome.winners:
        console.print(table)
    _print_refusals(console, outcome)
    if outcome.winners:
        _print_share(console, outcome)
    faster = sum(w.us < w.closed_form_us for w in outcome.winners.values())
    end = "; interrupted, run it again to go on" if outcome.interrupted else ""
    console.print(
        f"{len(outcome.winners)} choices measured, {faster} faster than the closed form's{end}. "
        f"{len(kept.winners)} are in {path}",
        markup=False,
        soft_wrap=True,
    )


def _print_share(console: Console, outcome: Outcome) -> None:
    """How near the closed form is to the best that was found, where it is farthest."""
    shares = {key: w.us / w.closed_form_us for key, w in outcome.winners.items()}
    worst = min(shares, key=shares.__getitem__)
    good = sum(share >= WANTED_SHARE for share in shares.values())
    console.print(
        f"The closed form's speed is at least {WANTED_SHARE:.0%} of the best found in {good} of "
        f"{len(shares)} choices, at worst {shares[worst]:.0%}, for {worst}.",
        markup=False,
        soft_wrap=True,
    )


def _print_refusals(console: Console, outcome: Outcome) -> None:
    for text in outcome.refused[:SHOWN_REFUSALS]:
        console.print(f"left out: {text}", markup=False, soft_wrap=True, style="yellow")
    more = len(outcome.refused) - SHOWN_REFUSALS
    if more > 0:
        reasons = Counter(text.rpartition(": ")[2] for text in outcome.refused[SHOWN_REFUSALS:])
        console.print(f"left out: {more} more ({', '.join(reasons)})", markup=False, style="yellow")


def _search_with_bar(
    jobs: Sequence[Job], bench: Bench, keeper: Keeper, console: Console
) -> Outcome:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    total = sum(len(job.candidates) for job in jobs)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(steps: int, what: str) -> None:
            bar.update(task, advance=steps, description=what)

        return search(jobs, bench, advance=advance, keep=keeper.keep)


def _table_to_continue(path: Path, target: Target, console: Console) -> Table:
    """What the file holds if it was measured here with these versions; else an empty table."""
    new = Table(target.device, target.name, torch.__version__, _version("triton"), _today())
    if not path.exists():
        return new
    old = read_table(path)
    if old.origin == new.origin:
        return old
    console.print(
        f"{path} was measured on {' with '.join(_what(old))} and starts anew with "
        f"{' with '.join(_what(new))}.",
        markup=False,
        soft_wrap=True,
        style="yellow",
    )
    return new


def _what(table: Table) -> tuple[str, str]:
    return table.device, f"torch {table.torch} and triton {table.triton}"


def _cells(key: Key, winner: Winner) -> tuple[str, ...]:
    config = winner.config
    return (
        str(key),
        f"{config.block_m} x {config.block_n} x {config.block_k}" + " by TMA" * config.tma,
        str(config.num_warps),
        str(config.num_stages),
        f"{winner.us:.4g}",
        f"{winner.closed_form_us:.4g}",
        f"{winner.closed_form_us / winner.us - 1:.1%}",
    )


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
