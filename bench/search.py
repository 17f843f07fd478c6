"""``python -m bench.search``: the closed form beside every launch that gives the same bits.

Of the products of Llama-3.1-8B, in one format after the other: what ``mokernels tune`` does for a
checkpoint, without one, and the fastest of each as a table under bench/results. Nothing is written
to the user's cache. Each configuration is compared with the closed form's to the bit before it is
timed, and results are written after each product.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from bench.support import results
from bench.support.gemms import SHAPES
from bench.support.machine import Machine, describe
from mokernels.errors import BackendError
from mokernels.formats import FORMATS, Activation
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.table_files import Key, Winner
from mokernels.ops.target import SM_90, Target
from mokernels.tuning import Bench, Job, Outcome, Product, jobs_for, search
from mokernels.tuning.device import DeviceBench, require_gpu

BYTES = {"NVFP4": 9 / 16, "MXFP8": 33 / 32}
"""Of an element of a weight, its block scales included; one where nothing is said."""
WAYS = {
    "fp8": ("FP8", Activation.FP8_STATIC),
    "fp8_block": ("FP8_PB_WO", Activation.FP8_BLOCK),
    "fp8_weight_only": ("FP8_PB_WO", Activation.NONE),
    "nvfp4": ("NVFP4", Activation.NVFP4),
    "mxfp8": ("MXFP8", Activation.MXFP8),
}
"""Formats of weights and activations; what is quantized per token is multiplied as fp8 is."""


def main(arguments: Sequence[str] | None = None, bench: Bench | None = None) -> int:
    """Exit code 1 if a configuration did not compile, or had other bits.

    Args:
        arguments: of the command line.
        bench: in place of the GPU.
    """
    options = parser().parse_args(arguments)
    if bench is None and not options.list:
        try:
            bench = DeviceBench(require_gpu("auto"))
        except BackendError:
            say("There is no GPU here, and nothing to search on. --list names the candidates.")
            return 0
    target = getattr(bench, "target", SM_90)
    jobs = list(chosen(options, target))
    if bench is None:
        for job in jobs:
            say(f"{job.key}: {len(job.candidates)} candidates")
        return 0
    machine = describe(torch.device(getattr(bench, "device", "cpu")), options.note)
    outcome = run(jobs, bench, machine, options)
    for text in outcome.refused:
        say(f"left out: {text}")
    left = len(jobs) - len(outcome.winners)
    say(f"{len(outcome.winners)} products were searched, {left} were not.")
    return 1 if outcome.refused else 0


def run(
    jobs: Sequence[Job], bench: Bench, machine: Machine, options: argparse.Namespace
) -> Outcome:
    """Search one product after the other, as long as there is time."""
    deadline = time.monotonic() + 60 * options.minutes
    found: dict[Key, tuple[Job, Winner]] = {}
    by_key = {job.key: job for job in jobs}

    def advance(steps: int, what: str) -> None:
        if time.monotonic() > deadline:
            raise KeyboardInterrupt  # which ends a search, and keeps what was found

    def keep(key: Key, winner: Winner) -> None:
        found[key] = (by_key[key], winner)
        write(machine, found, options)
        say(f"{key}: {line(winner)}")

    return search(jobs, bench, advance=advance, keep=keep)


def chosen(options: argparse.Namespace, target: Target) -> Iterator[Job]:
    """The products that were asked for, those of the fewest rows first."""
    products = [
        Product(FORMATS[WAYS[way][0]], WAYS[way][1], *SHAPES[shape])
        for way in options.way or WAYS
        for shape in options.shape or SHAPES
    ]
    jobs = jobs_for(products, target)
    for job in sorted(jobs, key=lambda job: job.key.rows):
        if not options.rows or job.rows[-1] in options.rows:
            yield job


def write(
    machine: Machine, found: Mapping[Key, tuple[Job, Winner]], options: argparse.Namespace
) -> Path:
    """``search-<device>-<date><part>.md``; such a file is replaced."""
    folder = options.out or results.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"search-{machine.slug}{options.part}.md"
    path.write_text(markdown(machine, found))
    return path


def markdown(machine: Machine, found: Mapping[Key, tuple[Job, Winner]]) -> str:
    """What was searched, as a table."""
    lines = [
        f"# Search of launches with equal bits on {machine.device}, {machine.date}",
        "",
        f"torch {machine.torch}, triton {machine.triton}, Python {machine.python}. {machine.note}",
        "",
        "| product | M | N x K | tried | fastest | us | GB/s | TFLOPS | closed form | us | share |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, (job, winner) in found.items():
        seconds, m = 1e-6 * winner.us, job.rows[-1]
        item = BYTES.get(job.product.format.name, 1.0)
        moved = key.n * key.k * item + m * key.k * 2 + m * key.n * 2
        cells = (
            f"{key.kind.value}, {job.product.activation.value}",
            " and ".join(map(str, job.rows)),
            f"{key.n}x{key.k}",
            str(len(job.candidates)),
            text_of(winner.config),
            f"{winner.us:.4g}",
            f"{moved / seconds / 1e9:,.0f}",
            f"{2 * m * key.n * key.k / seconds / 1e12:,.0f}",
            text_of(job.candidates[0]),
            f"{winner.closed_form_us:.4g}",
            f"{winner.us / winner.closed_form_us:.0%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Of several numbers of rows the time is the mean, and the rest is of the largest.",
    ]
    return "\n".join(lines) + "\n"


def text_of(config: GemmConfig) -> str:
    """A configuration in a cell."""
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    words = [tile, f"{config.num_warps} warps", f"{config.num_stages} stages"]
    words += [f"{config.split_k} parts"] * (config.split_k > 1)
    words += ["swapped"] * config.swap + ["by TMA"] * config.tma
    return ", ".join(words)


def line(winner: Winner) -> str:
    """One product for somebody who watches."""
    return f"{winner.us:.4g} us, {text_of(winner.config)} (closed form {winner.closed_form_us:.4g})"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.search", description=__doc__)
    add = made.add_argument
    add("--minutes", type=float, default=9.0, help="stop in time for this")
    add("--way", action="append", default=[], choices=WAYS, help="only these formats")
    add("--shape", action="append", default=[], choices=SHAPES, help="only these weights")
    add("--rows", action="append", default=[], type=int, help="only these: 16, 32, ... 512, 2048")
    add("--out", type=Path, help="folder for the results, bench/results by default")
    add("--part", default="", help="end of the file's name, for one of several runs")
    add("--note", default="", help="a sentence for the results")
    add("--list", action="store_true", help="name the products and measure nothing")
    return made


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
