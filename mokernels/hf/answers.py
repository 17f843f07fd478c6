"""An answer while it is made: which token ends it, and which text that leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mokernels.hf.sampling import SamplingParams

_LONGEST_CHARACTER = 4
"""Tokens of one byte that a character can take."""
_MARGIN = 8
"""Tokens before the stop text that are decoded with it: a text's first token may lose its space."""


@dataclass
class Answer:
    """One answer to one prompt.

    Attributes:
        prompt: token ids of the prompt.
        params: how tokens are chosen.
        seed: of the random numbers.
        ends: the model's own end tokens; none with ``ignore_eos``.
        limit: tokens at most.
        decode: from token ids to text.
        tokens: made so far, the one that ended the answer included.
        reason: ``"stop"`` or ``"length"`` once it has ended.
        stopped_by: the stop text or the token of ``stop_token_ids`` that ended it.
    """

    prompt: Sequence[int]
    params: SamplingParams
    seed: int
    ends: frozenset[int]
    limit: int
    decode: Callable[[Sequence[int]], str]
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    stopped_by: int | str | None = None

    @property
    def end_tokens(self) -> frozenset[int]:
        """All tokens that end the answer."""
        return self.ends | frozenset(self.params.stop_token_ids or ())

    def add(self, token: int) -> bool:
        """Take the next token; returns whether the answer has ended, as it then stays."""
        if self.reason is not None:
            return True
        self.tokens.append(token)
        if token in self.end_tokens:
            self.reason = "stop"
            self.stopped_by = None if token in self.ends else token
        elif found := self._found_stop():
            self.reason, self.stopped_by = "stop", found
        elif len(self.tokens) >= self.limit:
            self.reason = "length"
        return self.reason is not None

    def _found_stop(self) -> str | None:
        stops = self.params.stops
        if not stops or len(self.tokens) <= self.params.min_tokens:
            return None
        tail = self.tokens[-(_LONGEST_CHARACTER * max(map(len, stops)) + _MARGIN) :]
        end = self.decode(tail)
        if not any(stop in end for stop in stops):
            return None
        return self._first_stop(self.decode(self.tokens))

    def _first_stop(self, text: str) -> str | None:
        found = [stop for stop in self.params.stops if stop in text]
        return min(found, key=text.index) if found else None

    def text(self) -> str:
        """The answer: without the token that ended it, and cut before the stop text."""
        keep = self.params.include_stop_str_in_output
        if isinstance(self.stopped_by, str):
            text = self.decode(self.tokens)
            end = text.index(self.stopped_by) + (len(self.stopped_by) if keep else 0)
            return text[:end]
        ended = self.reason == "stop" and not keep
        return self.decode(self.tokens[:-1] if ended else self.tokens)
