"""Penalties, filters and stop texts, against direct computations."""

from __future__ import annotations

import pytest
import torch

from mokernels import SamplingParams
from mokernels.errors import ArgumentError
from mokernels.hf.answers import Answer
from mokernels.hf.sampling import choose, penalized, probabilities

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, -3.0])


def row_of(**options) -> torch.Tensor:
    return probabilities(LOGITS[None], [SamplingParams(**options)])[0]


def test_temperature():
    assert torch.allclose(row_of(temperature=0.5), (LOGITS / 0.5).softmax(-1))
    assert torch.equal(row_of(), LOGITS.softmax(-1))


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [0, 3]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_k": -1}, [0, 1, 2, 3, 4]),
        # Probabilities: .607, .030, .135, .223, .004.
        ({"top_p": 0.60}, [0]),
        ({"top_p": 0.61}, [0, 3]),
        ({"top_p": 0.96}, [0, 2, 3]),
        ({"top_p": 0.97}, [0, 1, 2, 3]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.3}, [0, 3]),
        ({"min_p": 1.0}, [0]),
        # The share is of what top_k leaves: .607 of .830 is .73.
        ({"top_k": 2, "top_p": 0.72}, [0]),
        ({"top_k": 3, "min_p": 0.3}, [0, 3]),
        # .607 / .830, after min_p took the others
        ({"min_p": 0.3, "top_p": 0.72}, [0]),
    ],
)
def test_filters(options, kept):
    wanted = torch.full_like(LOGITS, -torch.inf)
    wanted[kept] = LOGITS[kept]
    assert torch.allclose(row_of(**options), wanted.softmax(-1))


def test_rows_do_not_touch_each_other():
    rows = [SamplingParams(top_k=1), SamplingParams(), SamplingParams(top_p=0.6, temperature=2.0)]
    together = probabilities(LOGITS.repeat(3, 1), rows)
    for row, found in zip(rows, together, strict=True):
        assert torch.allclose(found, probabilities(LOGITS[None], [row])[0])
    assert torch.equal(together[1], LOGITS.softmax(-1))


def test_penalties():
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    found = penalized(LOGITS, params, prompt=[4, 4], answer=[0, 0, 1])
    # 0: 2 / 2 - .5 - 2 x .25; 1: -1 x 2 - .5 - .25; 4 is in the prompt alone: -3 x 2
    assert found.tolist() == [0.0, -2.75, 0.5, 1.0, -6.0]
    assert LOGITS.tolist() == [2.0, -1.0, 0.5, 1.0, -3.0]


def test_samples_follow_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=1.5, top_k=3)
    wanted = row_of(temperature=1.5, top_k=3)
    drawn = [int(choose(LOGITS[None], [params], [generator])) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=5) / 4000
    # Four standard deviations of a share of 4000 draws.
    assert (shares - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_greedy_rows_take_the_likeliest():
    greedy = SamplingParams(temperature=0)
    assert choose(LOGITS.repeat(2, 1), [greedy, greedy], [None, None]).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0, wanted at least 1"),
        ({"n": 2, "temperature": 0}, "n is 2, wanted 1 with temperature=0"),
        ({"temperature": -1}, "temperature is -1, wanted a number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0, wanted a share above 0"),
        ({"top_k": -2}, "top_k is -2, wanted a number of tokens"),
        ({"min_p": 1.5}, "min_p is 1.5, wanted a share from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, wanted a factor"),
        ({"presence_penalty": 3}, "presence_penalty is 3, wanted a number from -2 to 2"),
        ({"max_tokens": 0}, "max_tokens is 0, wanted at least 1, or None"),
        ({"stop": ["a", ""]}, r"stop is \['a', ''\], wanted texts, not empty"),
        ({"logprobs": 0}, "got logprobs, which mokernels does not support"),
        ({"bad_words": ["x"], "logit_bias": {}}, "got bad_words, logit_bias, which mokernels does"),
        ({"min_tokens": -1}, "min_tokens is -1, wanted at least 0 and at most max_tokens"),
        ({"min_tokens": 17}, "min_tokens is 17, wanted at least 0 and at most max_tokens"),
    ],
)
def test_parameters_that_cannot_be(options, message):
    with pytest.raises(ArgumentError, match=message):
        SamplingParams(**options)


def answer(**options) -> Answer:
    """An answer whose tokens are the bytes of its text."""
    params = SamplingParams(max_tokens=None, **options)
    return Answer(
        [0], params, 0, frozenset({0}), 99, lambda ids: bytes(ids).decode(errors="replace")
    )


def test_stop_texts_count_after_the_least_number_of_tokens():
    made = answer(stop="a", min_tokens=3)
    assert [made.add(byte) for byte in b"aaaa"] == [False, False, False, True]
    assert (made.stopped_by, made.text()) == ("a", "")


def test_a_stop_text_may_begin_in_the_middle_of_tokens():
    made = answer(stop=["löw", "x"])
    ended = [made.add(byte) for byte in "ein löwe".encode()]
    assert ended == [False] * 7 + [True] * 2
    assert (made.text(), made.reason, made.stopped_by) == ("ein ", "stop", "löw")
    assert len(made.tokens) == 8  # what comes after the end is not taken


def test_the_first_of_several_stop_texts_counts():
    made = answer(stop=["cde", "bcde"])
    assert [made.add(byte) for byte in b"abcde"][-1]
    assert (made.text(), made.stopped_by) == ("a", "bcde")
