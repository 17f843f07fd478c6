"""Perplexity against a direct computation, and the windows that it is made of."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mokernels.demo.perplexity import Window, perplexity, windows
from mokernels.errors import ArgumentError
from tests.support.models import tiny_model


class Bigrams:
    """Predicts from the last token alone, by a table of logits [V, V]."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        assert torch.is_inference_mode_enabled()
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids])


def test_uniform_predictions_have_the_vocabulary_as_perplexity():
    result = perplexity(Bigrams(torch.zeros(50, 50)), torch.arange(40) % 50, window=16, stride=8)
    assert result.value == pytest.approx(50, rel=1e-6)
    assert result.tokens == 39


def test_bigrams_by_hand():
    table = torch.randn(7, 7, generator=torch.Generator().manual_seed(1))
    tokens = torch.tensor([3, 1, 4, 1, 5, 2, 6, 5, 3, 5])
    chances = table.double().softmax(-1)
    # Windows [0, 4), [4, 8), [8, 10): tokens 0, 4 and 8 are each the first of a window.
    scored = [1, 2, 3, 5, 6, 7, 9]
    mean = -sum(math.log(chances[tokens[i - 1], tokens[i]]) for i in scored) / len(scored)
    result = perplexity(Bigrams(table), tokens, window=4, stride=4)
    assert result.tokens == len(scored)
    assert result.value == pytest.approx(math.exp(mean), rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 8), (16, 5), (16, 1), (64, 64)])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_token_is_predicted_from_its_window(window, stride, batch):
    """A model that attends to all it sees, against one run per token on just that prefix."""
    model = tiny_model("Llama").float()
    tokens = torch.randint(3, 128, (45,), generator=torch.Generator().manual_seed(2))
    total, count = 0.0, 0
    for place in windows(len(tokens), window, stride):
        for index in range(place.scored, place.stop):
            with torch.inference_mode():
                logits = model(input_ids=tokens[None, place.start : index]).logits[0, -1]
            total -= float(logits.double().log_softmax(-1)[tokens[index]])
            count += 1
    result = perplexity(model, tokens, window=window, stride=stride, batch=batch)
    assert result.tokens == count
    # fp32 sums in another order for another length; the perplexity itself is about 130.
    assert result.value == pytest.approx(math.exp(total / count), rel=1e-5)


def test_windows_of_one_length_share_a_batch_and_progress_counts_them():
    model, seen = Bigrams(torch.zeros(4, 4)), []
    tokens = torch.zeros(44, dtype=torch.int64)
    perplexity(model, tokens, window=8, stride=8, batch=4, progress=seen.append)
    assert model.shapes == [(4, 8), (1, 8), (1, 4)]
    assert seen == [4, 1, 1]


def test_nan_and_infinity_are_not_hidden():
    table = torch.zeros(4, 4)
    table[2] = torch.nan
    assert math.isnan(perplexity(Bigrams(table), torch.tensor([0, 1, 2, 3])).value)
    table[2] = torch.tensor([0.0, 0.0, 0.0, -torch.inf])
    assert perplexity(Bigrams(table), torch.tensor([0, 1, 2, 3])).value == math.inf


def test_known_windows():
    assert windows(10, 4, 4) == (Window(0, 4, 1), Window(4, 8, 5), Window(8, 10, 9))
    assert windows(10, 6, 2) == (Window(0, 6, 1), Window(2, 8, 6), Window(4, 10, 8))
    assert windows(9, 4, 4) == (Window(0, 4, 1), Window(4, 8, 5))  # nothing predicts the ninth
    assert windows(3, 512, 512) == (Window(0, 3, 1),)


@given(st.integers(2, 300), st.integers(2, 64), st.data())
def test_windows_cover_the_text_once(length, window, data):
    stride = data.draw(st.integers(1, window))
    places = windows(length, window, stride)
    scored = [index for place in places for index in range(place.scored, place.stop)]
    assert sorted(set(scored)) == scored
    firsts = {place.start for place in places} if stride == window else {0}
    alone = {length - 1} if stride == window and length % window == 1 else set()
    assert set(scored) == set(range(length)) - firsts - alone
    for place in places:
        assert 0 < place.stop - place.start <= window
        assert place.scored - place.start >= (max(1, window - stride) if place.start else 1)


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(1, 8, 8), (9, 1, 1), (9, 8, 0), (9, 8, 9)]
)
def test_undefined_windows_are_refused(length, window, stride):
    with pytest.raises(ArgumentError, match=f"{length} tokens in windows of {window} with stride"):
        windows(length, window, stride)
