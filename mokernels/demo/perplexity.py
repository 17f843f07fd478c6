"""Perplexity of a causal language model on a sequence of tokens, by a sliding window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mokernels.errors import ArgumentError


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood.

    Attributes:
        value: the perplexity; infinite or NaN if the model's logits are.
        tokens: number of tokens that were predicted.
    """

    value: float
    tokens: int


@dataclass(frozen=True)
class Window:
    """What the model sees at once, and which of it counts.

    Attributes:
        start: index of the first token that is seen.
        stop: index behind the last one.
        scored: index of the first token whose prediction counts; all from there on do.
    """

    start: int
    stop: int
    scored: int


def windows(length: int, window: int, stride: int) -> tuple[Window, ...]:
    """Windows over ``length`` tokens, each token but a window's first counted at most once.

    Every window but the last has ``window`` tokens and starts ``stride`` behind the one before, so
    that a token is predicted from at least ``window - stride`` others. The last one ends with the
    text, unless one single token is left, which nothing could predict.

    Raises:
        ArgumentError: fewer than 2 tokens, or not 1 <= stride <= window with window >= 2.
    """
    if length < 2 or window < 2 or not 1 <= stride <= window:
        raise ArgumentError(
            f"Perplexity of {length} tokens in windows of {window} with stride {stride} is not "
            "defined; wanted at least 2 tokens, a window of at least 2 and 1 <= stride <= window."
        )
    found: list[Window] = []
    end = 0
    for start in range(0, length - 1, stride):
        stop = min(start + window, length)
        found.append(Window(start, stop, max(end, start + 1)))
        end = stop
        if stop == length:
            break
    return tuple(found)


def perplexity(
    model: Any,
    tokens: Tensor,
    *,
    window: int = 512,
    stride: int = 512,
    batch: int = 4,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Perplexity of ``model`` on ``tokens``.

    Args:
        model: called with ``input_ids`` [B, T]; returns an object with ``logits`` [B, T, V].
        tokens: int64 [T], on the model's device.
        window: tokens that the model sees at once.
        stride: distance of the windows' starts; the window's size makes them disjoint.
        batch: windows that go through the model together.
        progress: called with the number of windows after each batch.

    Returns:
        The mean is over all predicted tokens, not over windows; sums are in float64.

    Raises:
        ArgumentError: as :func:`windows`.
    """
    total, count = 0.0, 0
    with torch.inference_mode():
        for group in _batches(windows(len(tokens), window, stride), batch):
            ids = torch.stack([tokens[place.start : place.stop] for place in group])
            logits = model(input_ids=ids, use_cache=False).logits
            for row, place in zip(logits, group, strict=True):
                total += _negative_log_likelihood(row, tokens, place)
                count += place.stop - place.scored
            if progress is not None:
                progress(len(group))
    mean = total / count
    return Perplexity(math.exp(mean) if mean < 700 else mean * math.inf, count)


def _batches(places: Sequence[Window], batch: int) -> Iterator[list[Window]]:
    """Groups of at most ``batch`` consecutive windows of the same length."""
    group: list[Window] = []
    for place in places:
        length = place.stop - place.start
        if group and (len(group) == batch or group[0].stop - group[0].start != length):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _negative_log_likelihood(logits: Tensor, tokens: Tensor, place: Window) -> float:
    """Sum over the counted tokens; ``logits`` [T, V], whose row t predicts token t + 1."""
    rows = logits[place.scored - place.start - 1 : -1].float()
    losses = cross_entropy(rows, tokens[place.scored : place.stop], reduction="none")
    return float(losses.double().sum())
