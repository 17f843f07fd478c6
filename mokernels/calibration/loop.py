"""Running a model on batches, with a progress bar, and from where an earlier run was stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn

from mokernels.errors import ArgumentError

ForwardLoop = Callable[[Any], object] | Iterable[Any]
"""What calibrates: a function that calls the model it is given, or batches to call it with."""

Progress = Callable[[int, int | None], None]
"""Called with the number of batches done and, where it is known, of all batches."""


def run_batches(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    skip: int = 0,
    done: Callable[[int], None] = lambda count: None,
    progress: Progress | None = None,
) -> int:
    """Call ``model`` with every batch, without gradients.

    Args:
        model: called with the batch's entries as keyword arguments; a tensor or nested list of ids
            is passed as ``input_ids``.
        batches: dictionaries, tensors [B, T] or lists of ids.
        skip: batches at the beginning that were done before.
        done: called after each batch with the number of batches done.
        progress: likewise, with the total.

    Returns:
        The number of batches, skipped ones included.

    Raises:
        ArgumentError: a batch is nothing that a model can be called with.
    """
    total = len(batches) if isinstance(batches, Sized) else None
    device = _device(model)
    count = 0
    with torch.inference_mode():
        for count, batch in enumerate(batches, start=1):
            if count > skip:
                model(**_arguments(batch, device))
                done(count)
            if progress is not None:
                progress(count, total)
    return count


def _device(model: nn.Module) -> torch.device:
    """Where the model's first tensor is that is not offloaded."""
    for tensor in model.parameters():
        if not tensor.is_meta:
            return tensor.device
    return torch.device("cpu")


def _arguments(batch: Any, device: torch.device) -> dict[str, Any]:
    if isinstance(batch, Mapping):
        given = dict(batch)
    elif isinstance(batch, Tensor):
        given = {"input_ids": batch}
    elif isinstance(batch, (list, tuple)) and batch:
        try:
            given = {"input_ids": torch.tensor(batch)}
        except (TypeError, ValueError, RuntimeError):
            raise _no_batch(batch) from None
    else:
        raise _no_batch(batch)
    ids = given.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 1:
        given["input_ids"] = ids[None]
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}


def _no_batch(batch: object) -> ArgumentError:
    return ArgumentError(
        f"A calibration batch is a {type(batch).__name__}, wanted a dictionary of the model's "
        "arguments, a tensor of token ids [B, T] or a list of ids. mokernels.calibration.text "
        "makes batches of text."
    )
