"""Writing an unquantized transformers model as a ModelOpt checkpoint, without calibration."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mokernels.checkpoint import quantize_weight, write_checkpoint
from mokernels.errors import ArgumentError
from mokernels.formats import FORMATS, Format, find_format

DEFAULT_FORMAT = "FP8_PER_CHANNEL_PER_TOKEN"


def formats_without_calibration() -> tuple[Format, ...]:
    """The formats that a model can be quantized to without running data through it.

    FP8 is one of them: without calibrated input scales its activations are quantized per token.
    """
    return tuple(row for row in FORMATS.values() if not _requires_data(row))


def _requires_data(format: Format) -> bool:
    size = format.k_multiple
    stored = format.tensors(size, size)
    return any(spec.required and spec.leaf == "input_scale" for spec in stored)


def choose_format(name: str) -> Format:
    """The format called ``name``, if it needs no calibration.

    Raises:
        ArgumentError: it is unknown or needs calibration; the message names those that do not.
    """
    choices = ", ".join(row.name for row in formats_without_calibration())
    row = find_format(name)
    if row is None:
        raise ArgumentError(f"The format {name!r} is not known; wanted one of {choices}.")
    if _requires_data(row):
        raise ArgumentError(
            f"{row.name} needs calibrated activation scales, which the demo does not make: the "
            f"model would have to see data first. Choose one of {choices}, or quantize the model "
            "with nvidia-modelopt and load its export."
        )
    return row


def quantizable_layers(model: nn.Module, format: Format) -> list[str]:
    """Names of the linear layers that ``format`` fits, the output layer aside."""
    output = output_layer(model)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not output
        and module.in_features % format.k_multiple == 0
    ]


def output_layer(model: Any) -> nn.Module | None:
    """The layer that makes the logits, or None; quantizing it costs more than it saves."""
    module: nn.Module | None = model.get_output_embeddings()
    return module


def excluded_modules(model: Any, quantized: list[str]) -> list[str]:
    """Names of the linear and embedding layers that stay as they are."""
    kept = set(quantized)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding)) and name not in kept
    ]


def write_quantized(
    model: Any,
    tokenizer: Any,
    folder: Path,
    format: Format,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Quantize every linear layer but the output layer, and write a checkpoint folder.

    Args:
        model: an unquantized transformers model.
        tokenizer: its files are written too.
        folder: to create; see :func:`mokernels.checkpoint.write_checkpoint`.
        format: one that needs no calibration.
        progress: called with the number of tensors of the model done and their total.

    Raises:
        ArgumentError: the model has no layer that the format fits.
        CheckpointError: the folder exists and is not empty.
    """
    quantized = quantizable_layers(model, format)
    if not quantized:
        raise ArgumentError(
            f"{type(model).__name__} has no linear layer that {format.name} fits: wanted input "
            f"features that are a multiple of {format.k_multiple}. Choose another format."
        )
    return write_checkpoint(
        folder,
        checkpoint_tensors(model, format, quantized, progress),
        model.config.to_dict(),
        format,
        exclude=excluded_modules(model, quantized),
        extra_files=_companions(model, tokenizer),
    )


def checkpoint_tensors(
    model: nn.Module,
    format: Format,
    quantized: list[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, one layer quantized at a time; tied tensors come once."""
    weights = {f"{name}.weight" for name in quantized}
    seen: set[tuple[int, tuple[int, ...]]] = set()
    state = model.state_dict()
    for done, (key, tensor) in enumerate(state.items(), start=1):
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if key in weights:
            owner = key.removesuffix(".weight")
            for leaf, stored in quantize_weight(format, tensor).items():
                yield f"{owner}.{leaf}", stored
        elif place not in seen or tensor.numel() == 0:
            yield key, tensor
        seen.add(place)
        progress(done, len(state))


def _companions(model: Any, tokenizer: Any) -> dict[str, bytes]:
    """The other files of a model's folder: how to generate, and the tokenizer's."""
    with tempfile.TemporaryDirectory() as scratch:
        if model.can_generate():
            model.generation_config.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        return {file.name: file.read_bytes() for file in Path(scratch).iterdir() if file.is_file()}
