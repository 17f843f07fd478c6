"""``mokernels quantize``: from a model to a checkpoint, with what it cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

import mokernels
from mokernels import calibration
from mokernels.demo.flow import quiet_transformers
from mokernels.demo.report import RichReporter
from mokernels.demo.text import reference_text
from mokernels.errors import ArgumentError
from mokernels.evaluate.held_back import HeldBack
from mokernels.hf.auto import is_modelopt, load_model, load_tokenizer
from mokernels.hf.placement import input_device
from mokernels.ptq.config import named_format
from mokernels.ptq.convert import is_calibrated
from mokernels.ptq.record import Quantization, quantization_of

HELD_BACK_WINDOWS = 8
"""Windows of 512 tokens that the original and the quantized model are compared on."""


@dataclass(frozen=True)
class Task:
    """What the user asked for.

    Attributes:
        model: folder of an unquantized model.
        output: folder to create.
        format: name of the format.
        calib: text to calibrate with; None where none is needed.
        exclude: patterns of modules that stay plain.
        kv_cache: algorithm of the KV cache, or None.
        observer: see :func:`mokernels.quantize`.
        unseen: likewise.
        resume: likewise.
        samples: of calibration.
        length: tokens of a sample.
        batch_size: samples at a time.
        device: to run on, or a ``device_map`` of transformers ("auto").
        evaluate: text to compare on; None for the one that every Python brings along.
        compare: whether to compare at all.
        trust_remote_code: as in transformers.
    """

    model: str
    output: Path
    format: str
    calib: Path | None = None
    exclude: tuple[str, ...] = ()
    kv_cache: str | None = None
    observer: str = "max"
    unseen: str = "error"
    resume: Path | None = None
    samples: int = 128
    length: int = 512
    batch_size: int = 4
    device: str = "cpu"
    evaluate: Path | None = None
    compare: bool = True
    trust_remote_code: bool = False


def quantize(task: Task, console: Console) -> Quantization:
    """Load, calibrate, quantize, export; progress goes to ``console``.

    Raises:
        MokernelsError: a step failed; nothing was written then.
    """
    row = named_format(task.format)
    if task.calib is None and (is_calibrated(row) or task.kv_cache):
        raise ArgumentError(
            f"{row.name if is_calibrated(row) else 'A KV cache'} needs calibrated scales: give a "
            "text that is like what the model will see, --calib FILE (.txt or .jsonl)."
        )
    steps = RichReporter(console).step
    with quiet_transformers(), steps("load the model"):
        model = load_model(
            task.model,
            device_map=task.device,
            trust_remote_code=task.trust_remote_code,
        )
        if is_modelopt(model.config):
            raise ArgumentError(
                f"{task.model!r} is quantized already. Give the original model, or turn this one "
                "back with `mokernels dequantize`."
            )
        tokenizer = load_tokenizer(task.model, instead="")
    batches = _batches(task, tokenizer)
    with quiet_transformers(), _held_back(task, model, tokenizer):
        mokernels.quantize(
            model,
            task.format,
            batches,
            exclude=task.exclude,
            kv_cache=task.kv_cache,
            observer=task.observer,
            unseen=_number_or_word(task.unseen),
            resume=task.resume,
            out_dir=task.output,
            progress=steps,
        )
    with quiet_transformers(), steps("write the checkpoint, load and compare it"):
        mokernels.export(model, task.output, tokenizer=tokenizer)
    record = quantization_of(model)
    assert record is not None
    return record


def check_stream(given: Sequence[str]) -> None:
    """Refuse options that need a model where none is loaded.

    Args:
        given: names of those that were given.

    Raises:
        ArgumentError: there are some.
    """
    if given:
        raise ArgumentError(
            "--stream quantizes weights alone and runs no model, which is what "
            f"{' and '.join(given)} would need. Leave out the one or the other."
        )


def stream(
    model: str, output: Path, format: str, exclude: Iterable[str] | None, device: str
) -> None:
    """Quantize the weights of a folder without loading a model.

    Raises:
        ArgumentError: the folder cannot be quantized so.
    """
    mokernels.quantize_checkpoint(model, output, format, exclude=exclude or (), device=device)


def print_record(console: Console, record: Quantization, output: Path) -> None:
    """What was done, and what it cost, as tables."""
    console.print(_noise_table(record))
    found = record.extra.get("held_back")
    if found:
        console.print(
            f"On {found['tokens']} tokens held back: perplexity {found['perplexity']:.3f}, "
            f"{found['perplexity'] / found['perplexity_of_the_original']:.4f} times the original's "
            f"{found['perplexity_of_the_original']:.3f}; KL divergence "
            f"{found['kl_divergence']:.4f} nats a token; the same likeliest token "
            f"{found['greedy_agreement']:.1%}."
        )
    if record.exclude:
        console.print(f"Not quantized: {', '.join(record.exclude)}", markup=False)
    if record.filled:
        console.print(f"Saw no data, amax made up: {', '.join(record.filled)}", markup=False)
    console.print(f"The checkpoint is in {output}", markup=False, soft_wrap=True)


def _batches(task: Task, tokenizer: Any) -> Any:
    if task.calib is None:
        return None
    sizes = {"samples": task.samples, "length": task.length, "batch_size": task.batch_size}
    return calibration.text(tokenizer, task.calib, **sizes)


def _held_back(task: Task, model: Any, tokenizer: Any) -> Any:
    """The context that compares, or one that does nothing."""
    if not task.compare:
        return nullcontext()
    text = task.evaluate.read_text("utf-8") if task.evaluate else reference_text().text
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return HeldBack(model, ids[: 512 * HELD_BACK_WINDOWS].to(input_device(model)))


def _number_or_word(value: str) -> str | float:
    try:
        return float(value)
    except ValueError:
        return value


def _noise_table(record: Quantization) -> Table:
    """Signal to quantization noise of the weights, by kind of projection."""
    kinds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for name, row in record.layers.items():
        kinds[name.rpartition(".")[2], row.name].append(record.noise[name])
    table = Table(title=f"{len(record.layers)} layers quantized", title_justify="left")
    table.add_column("projection")
    table.add_column("format")
    for title in ("layers", "mean SQNR, dB", "least"):
        table.add_column(title, justify="right")
    for (kind, format), values in kinds.items():
        numbers = (str(len(values)), f"{mean(values):.1f}", f"{min(values):.1f}")
        table.add_row(kind, format, *numbers)
    return table
