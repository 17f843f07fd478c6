"""``mokernels.compare``: a model and its quantization."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mokernels.checkpoint import open_checkpoint
from mokernels.checkpoint.files import checked_folder, has_file, read_json
from mokernels.demo.flow import compute_dtype
from mokernels.demo.text import reference_text
from mokernels.errors import ArgumentError
from mokernels.evaluate.predictions import Predictions, Setting, compare_predictions
from mokernels.evaluate.weights import WeightErrors, compare_weights

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Comparison:
    """How two models differ.

    Attributes:
        a: folder of the reference.
        b: folder of the model that is compared with it.
        weights: of both, layer by layer; None if they were not compared.
        predictions: of both, on a text; None if they were not compared.
    """

    a: str
    b: str
    weights: WeightErrors | None
    predictions: Predictions | None

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON has them: an infinite SQNR (equal weights) is null."""
        found = dataclasses.asdict(self)
        for layer in (found["weights"] or {}).get("layers", ()):
            layer["sqnr"] = layer["sqnr"] if math.isfinite(layer["sqnr"]) else None
        return found


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    text: str | None = None,
    weights: bool = True,
    predictions: bool = True,
    window: int = 512,
    windows: int = 8,
    batch: int = 4,
    device: str | None = None,
    dtype: Any = None,
    activations: str = "checkpoint",
    progress: Progress = lambda step, done, total: None,
) -> Comparison:
    """Compare a model with its quantization: SQNR, perplexity, KL divergence, greedy agreement.

    Weights are compared as codes and scales say, in fp32 and layer by layer, without loading a
    model. Predictions are those of the models as they run, one after the other, on a text; the
    first one's logits are kept on the disk (tokens times vocabulary).

    Args:
        a: folder of the reference: a ModelOpt checkpoint or a plain model.
        b: folder of another checkpoint of the same model.
        text: to predict; a text that comes with Python, if None.
        weights: whether to compare them.
        predictions: whether to compare them.
        window: tokens that a model sees at once; windows do not overlap.
        windows: of the text's beginning, at most.
        batch: windows that go through a model together.
        device: to run on; a GPU if there is one.
        dtype: of what is not quantized; by default bfloat16, and float32 for small models on a CPU.
        activations: of quantized models, see :func:`mokernels.from_pretrained`.
        progress: called with the name of the step, and how much of it is done and to do.

    Returns:
        All numbers.

    Raises:
        CheckpointError: a folder is missing or broken.
        ArgumentError: the two are not of the same architecture, sizes or tokenizer, or a number is
            out of range.
    """
    first, second = checked_folder(a), checked_folder(b)
    _check_numbers(window=window, windows=windows, batch=batch)
    check_same_architecture(first, second)
    found: WeightErrors | None = None
    predicted: Predictions | None = None
    if weights:
        found = compare_weights(first, second, lambda *count: progress("weights", *count))
    if predictions:
        place = device or default_device()
        chosen = dtype or _default_dtype(second, place)
        setting = Setting(place, chosen, activations, window, windows, batch)
        words = reference_text().text if text is None else text
        predicted = compare_predictions(
            first, second, words, setting, lambda *count: progress("predictions", *count)
        )
    return Comparison(str(a), str(b), found, predicted)


def check_same_architecture(a: Path, b: Path) -> None:
    """Raise ArgumentError if the two config.json name different kinds of models."""
    kinds = [_kind(folder) for folder in (a, b)]
    if kinds[0] != kinds[1]:
        raise ArgumentError(
            f"{str(a)!r} and {str(b)!r} are models of different architectures: {kinds[0]} and "
            f"{kinds[1]}. Compare a model with its own quantization."
        )


def _kind(folder: Path) -> str:
    config = read_json(folder, "config.json") if has_file(folder, "config.json") else {}
    names = config.get("architectures") or ["no architecture"]
    return f"{', '.join(map(str, names))} ({config.get('model_type', 'no model_type')})"


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        least = 2 if name == "window" else 1
        if value < least:
            raise ArgumentError(f"{name} is {value}, wanted at least {least}.")


def default_device() -> str:
    """The GPU if there is one, else ``"cpu"``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def _default_dtype(folder: Path, device: str) -> torch.dtype:
    with open_checkpoint(folder) as checkpoint:
        return compute_dtype(None, device, checkpoint.nbytes // 2)
