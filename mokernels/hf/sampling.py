"""How tokens are chosen: the parameters, under the names that they have in vLLM, and the choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mokernels.errors import ArgumentError

GREEDY_BELOW = 1e-5
"""Temperatures below this take the likeliest token each time."""

_REFUSED = {"allowed_token_ids": None, "bad_words": None, "logit_bias": None,
            "logits_processors": None, "logprobs": None, "prompt_logprobs": None,
            "structured_outputs": None}  # fmt: skip
"""Parameters of vLLM that are not supported, and the value that leaves them out."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the answers to one prompt are made; names and defaults are vLLM's.

    The filters apply in vLLM's order: penalties, temperature, min_p, top_k, top_p.

    Args:
        n: answers to each prompt.
        temperature: the logits are divided by it; 0 takes the likeliest token each time.
        top_p: sample from the likeliest tokens that make up this share, in (0, 1].
        top_k: sample from so many of the likeliest tokens; 0 and -1 from all.
        min_p: sample from tokens at least this share as likely as the likeliest, in [0, 1].
        repetition_penalty: above 1 makes tokens of the prompt and the answer less likely.
        presence_penalty: subtracted from the logit of a token that the answer has already.
        frequency_penalty: the same, times how often the answer has it.
        seed: of this prompt's answers, whatever else is in the batch; answer i has seed + i. None
            draws one by torch's global generator.
        max_tokens: tokens of an answer at most; None for as many as the model has positions.
        min_tokens: tokens before which no end token is chosen and no stop text is looked for.
        stop: text or texts at which an answer ends; it is cut before them.
        stop_token_ids: tokens at which an answer ends, beside the model's own.
        ignore_eos: go on behind the model's own end tokens.
        include_stop_str_in_output: leave the stop text at the answer's end.
        skip_special_tokens: leave them out of the text.
        allowed_token_ids, bad_words, logit_bias, logits_processors, logprobs, prompt_logprobs,
            structured_outputs: of vLLM, and not supported: leave them out.

    Raises:
        ArgumentError: a value is out of its range, or a parameter is not supported.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: None = None
    bad_words: None = None
    logit_bias: None = None
    logits_processors: None = None
    logprobs: None = None
    prompt_logprobs: None = None
    structured_outputs: None = None

    def __post_init__(self) -> None:
        refused = [name for name, absent in _REFUSED.items() if getattr(self, name) != absent]
        if refused:
            raise ArgumentError(
                f"SamplingParams got {', '.join(refused)}, which mokernels does not support. Leave "
                "it out, or load the checkpoint in vLLM."
            )
        for name, fits, wanted in self._rules():
            if not fits:
                raise ArgumentError(
                    f"SamplingParams: {name} is {getattr(self, name)!r}, wanted {wanted}."
                )

    def _rules(self) -> tuple[tuple[str, bool, str], ...]:
        limit, strings = self.max_tokens, self.stops
        return (
            ("n", self.n >= 1, "at least 1"),
            ("n", self.n == 1 or not self.greedy, "1 with temperature=0: all would be the same"),
            ("temperature", 0 <= self.temperature < float("inf"), "a number of at least 0"),
            ("top_p", 0 < self.top_p <= 1, "a share above 0 and at most 1"),
            ("top_k", self.top_k >= -1, "a number of tokens, or 0 for all"),
            ("min_p", 0 <= self.min_p <= 1, "a share from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < 10, "a factor above 0, below 10"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "a number from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "a number from -2 to 2"),
            ("max_tokens", limit is None or limit >= 1, "at least 1, or None"),
            (
                "min_tokens",
                0 <= self.min_tokens <= (self.min_tokens if limit is None else limit),
                "at least 0 and at most max_tokens",
            ),
            ("stop", all(isinstance(text, str) and text for text in strings), "texts, not empty"),
        )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < GREEDY_BELOW

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def penalized(self) -> bool:
        """Whether earlier tokens change the logits."""
        penalties = (self.presence_penalty, self.frequency_penalty, self.repetition_penalty - 1)
        return any(penalties)

    @property
    def filters(self) -> tuple[Any, ...]:
        """What continuous batching can apply: (temperature, top_k, top_p), or () when greedy."""
        return () if self.greedy else (self.temperature, max(self.top_k, 0), self.top_p)


def penalized(
    scores: Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Logits [V] after the penalties.

    Args:
        scores: logits [V], fp32.
        params: of the row.
        prompt: its token ids.
        answer: token ids made so far.
    """
    made = torch.tensor(list(answer), dtype=torch.long, device=scores.device)
    seen = torch.tensor([*prompt, *answer], dtype=torch.long, device=scores.device).unique()
    result, factor = scores.clone(), params.repetition_penalty
    before = scores[seen]
    result[seen] = torch.where(before > 0, before / factor, before * factor)
    counts = torch.bincount(made, minlength=scores.numel())
    result -= params.frequency_penalty * counts
    result -= params.presence_penalty * (counts > 0)
    return result


def probabilities(scores: Tensor, rows: Sequence[SamplingParams]) -> Tensor:
    """Probabilities [B, V] to sample from: temperature, then min_p, top_k and top_p.

    Args:
        scores: logits [B, V], fp32.
        rows: parameters of each row; greedy ones are treated as temperature 1.
    """

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=scores.device).unsqueeze(1)

    scores = scores / column([1.0 if row.greedy else row.temperature for row in rows])
    if any(row.min_p for row in rows):
        chances = scores.softmax(-1)
        floor = column([row.min_p for row in rows]) * chances.amax(-1, keepdim=True)
        scores = scores.masked_fill(chances < floor, -torch.inf)
    size = scores.shape[1]
    if any(row.top_k > 0 or row.top_p < 1 for row in rows):
        ordered, places = scores.sort(dim=-1, descending=True)
        kept = column([min(row.top_k, size) if row.top_k > 0 else size for row in rows], torch.long)
        beyond = torch.arange(size, device=scores.device) >= kept
        chances = ordered.masked_fill(beyond, -torch.inf).softmax(-1)
        # A token stays if those before it do not make up the share yet; so the first always does.
        shares = column([row.top_p if row.top_p < 1 else torch.inf for row in rows])
        beyond |= chances.cumsum(-1) - chances >= shares
        scores = scores.masked_fill(beyond.scatter(-1, places, beyond), -torch.inf)
    return scores.softmax(-1)


def choose(
    scores: Tensor, rows: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> Tensor:
    """Token ids [B]: the likeliest of greedy rows, a sample of the others.

    Args:
        scores: logits [B, V], fp32, after penalties.
        rows: parameters of each row.
        generators: random numbers of each row, on the logits' device; None for greedy ones.
    """
    chosen = scores.argmax(-1)
    sampled = [index for index, row in enumerate(rows) if not row.greedy]
    if sampled:
        chances = probabilities(scores[sampled], [rows[index] for index in sampled])
        for row, index in zip(chances, sampled, strict=True):
            chosen[index] = torch.multinomial(row, 1, generator=generators[index])[0]
    return chosen
