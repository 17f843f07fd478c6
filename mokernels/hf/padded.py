"""Answers by ``mokernels.generate``, in batches padded on the left; each row has its own choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mokernels.hf.answers import Answer
from mokernels.hf.engine import Engine
from mokernels.hf.generate import generate
from mokernels.hf.sampling import choose, penalized


def answer_padded(
    model: Any, answers: Sequence[Answer], engine: Engine, pad: int, finished: Callable[[], None]
) -> None:
    """Make the answers, prompts of similar length together.

    Args:
        model: a decoder.
        answers: to fill.
        engine: how.
        pad: any token id; it is masked.
        finished: called for each answer that has ended.
    """
    ordered = sorted(answers, key=lambda answer: -len(answer.prompt))
    for start in range(0, len(ordered), engine.max_num_seqs):
        rows = ordered[start : start + engine.max_num_seqs]
        _answer_batch(model, rows, pad, finished, False if engine.enforce_eager else "auto")


def _answer_batch(
    model: Any,
    rows: Sequence[Answer],
    pad: int,
    finished: Callable[[], None],
    compile: bool | str,
) -> None:
    width = max(len(row.prompt) for row in rows)
    lengths = torch.tensor([[len(row.prompt)] for row in rows])
    ids = [[pad] * (width - len(row.prompt)) + list(row.prompt) for row in rows]
    mask = (torch.arange(width) >= width - lengths).long()
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": mask}
    with bare_generation_config(model, pad), torch.no_grad():
        generate(
            model,
            {name: tensor.to(model.device) for name, tensor in inputs.items()},
            logits_processor=LogitsProcessorList([Choice(rows, model.device)]),
            stopping_criteria=StoppingCriteriaList([Watch(rows, finished)]),
            max_new_tokens=max(row.limit for row in rows),
            compile=compile,
            cuda_graphs=compile,
        )


class Choice(LogitsProcessor):
    """Leaves one token of each row: the one that its own parameters and random numbers choose."""

    def __init__(self, rows: Sequence[Answer], device: torch.device) -> None:
        self._rows = rows
        self._generators = [
            None if row.params.greedy else torch.Generator(device).manual_seed(row.seed)
            for row in rows
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] to -inf but for the chosen tokens; greedy rows alone stay as they are."""
        params = [row.params for row in self._rows]
        scores = self._without_early_ends(scores)
        if any(choice.penalized for choice in params):
            scores = torch.stack(
                [
                    penalized(logits, row.params, row.prompt, row.tokens)
                    if row.params.penalized
                    else logits
                    for logits, row in zip(scores, self._rows, strict=True)
                ]
            )
        if all(choice.greedy for choice in params):
            return scores
        chosen = choose(scores, params, self._generators)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen.unsqueeze(1), 0.0)

    def _without_early_ends(self, scores: Tensor) -> Tensor:
        """End tokens to -inf in rows that have fewer tokens than they are to have at least."""
        early = [
            (index, token)
            for index, row in enumerate(self._rows)
            if len(row.tokens) < row.params.min_tokens
            for token in row.end_tokens
            if token < scores.shape[1]
        ]
        if not early:
            return scores
        places, ends = torch.tensor(early, device=scores.device).unbind(1)
        return scores.index_put((places, ends), scores.new_tensor(-torch.inf))


class Watch(StoppingCriteria):
    """Hands each row's new token to its answer, and ends the batch when all answers have."""

    def __init__(self, rows: Sequence[Answer], finished: Callable[[], None]) -> None:
        self._rows = rows
        self._finished = finished

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows have ended, bool [B]."""
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.reason is None and row.add(token):
                self._finished()
        ended = [row.reason is not None for row in self._rows]
        return torch.tensor(ended, device=input_ids.device)


@contextmanager
def bare_generation_config(model: Any, pad: int) -> Iterator[None]:
    """Let the model's own settings (penalties, end tokens, ...) not apply for a while."""
    own = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=pad)
    try:
        yield
    finally:
        model.generation_config = own
