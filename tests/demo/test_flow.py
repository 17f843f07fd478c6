"""The demo from end to end on a tiny random model, and what makes it fail."""

import io
import math
import re
from contextlib import contextmanager

import pytest
import torch
from rich.console import Console

import mokernels
from mokernels.demo import flow, report
from mokernels.demo.flow import Measured, Outcome, Request
from mokernels.demo.perplexity import Perplexity
from mokernels.demo.source import Source, load_original
from mokernels.formats import FORMATS
from tests.demo.tiny import save_model


class Recorder:
    """Keeps the titles of the steps and the progress in each."""

    def __init__(self) -> None:
        self.steps: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def step(self, title):
        calls = self.steps[title] = []
        yield lambda done, total: calls.append((done, total))


@pytest.fixture(autouse=True)
def _short_text(monkeypatch):
    monkeypatch.setattr(flow, "WINDOW", 64)
    monkeypatch.setattr(flow, "STRIDE", 64)
    monkeypatch.setattr(flow, "WINDOWS", 3)
    monkeypatch.setattr(flow, "CALIBRATION_SAMPLES", 2)


@pytest.fixture
def request_for(tmp_path):
    source = Source(save_model(tmp_path / "model", tied=True), None, "tiny")

    def make(format="FP8_PER_CHANNEL_PER_TOKEN", **options) -> Request:
        return Request(source, FORMATS[format], max_new_tokens=6, **options)

    return make


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_end_to_end(request_for, tmp_path, format):
    recorder = Recorder()
    request = request_for(format, output=tmp_path / "kept" / "checkpoint", prompt="Why?")
    outcome = flow.run(request, recorder)
    assert outcome.problems == []
    assert outcome.layers == 2 * 7
    assert outcome.quantized.nbytes < 0.8 * outcome.original.nbytes
    assert outcome.original.perplexity.tokens == 3 * 63
    # The weights are random: every token has about the same chance, 1 / 320.
    assert outcome.original.perplexity.value == pytest.approx(320, rel=0.2)
    assert 0.97 < outcome.ratio < 1.03
    assert outcome.ratio != 1  # two models were measured, not one of them twice
    assert recorder.steps["perplexity of the quantized model"] == [(0, 3), (3, 3)]
    loaded = mokernels.from_pretrained(tmp_path / "kept" / "checkpoint", dtype=torch.float32)
    _, tokenizer = load_original(request.source)
    ids = flow.answer_tokens(loaded, tokenizer, "Why?", 6)
    assert outcome.quantized.answer == tokenizer.decode(ids).strip()


def test_without_output_nothing_is_left_behind(request_for, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(flow.tempfile, "tempdir", str(tmp_path / "scratch"))
    assert flow.run(request_for(), Recorder()).layers == 14
    assert list((tmp_path / "scratch").iterdir()) == []


def test_original_is_measured_without_quantization(request_for):
    outcome = flow.run(request_for("FP8"), Recorder())
    model, tokenizer = load_original(request_for().source)
    tokens = flow._tokenize(tokenizer, Outcome())
    assert len(tokens) == 3 * 64
    expected = flow.perplexity(model.float(), tokens, window=64, stride=64)
    assert outcome.original.perplexity.value == pytest.approx(expected.value, rel=1e-6)


def measured(perplexity: float, answer: str = "text") -> Measured:
    return Measured(1, answer, 1.0, Perplexity(perplexity, 10))


@pytest.mark.parametrize(
    ("quantized", "problem"),
    [
        (measured(10.49), None),
        (measured(10.51), r"perplexity is 1\.0510 times the original's, wanted at most 1\.05\."),
        (measured(math.nan), "perplexity is nan times"),
        (measured(math.inf), "perplexity is inf times"),
        (measured(10.0, " \n"), "answer to the prompt is empty"),
    ],
)
def test_what_makes_the_demo_fail(quantized, problem):
    problems = Outcome(original=measured(10.0), quantized=quantized).problems
    if problem is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert re.search(problem, problems[0])


def test_settings_of_transformers_are_put_back():
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with flow.quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), flow.quiet_transformers():
        raise KeyError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_the_dtype_of_the_computation():
    large = 2_000_000_000
    assert flow.compute_dtype(None, "cpu", 135_000_000) == torch.float32
    assert flow.compute_dtype(None, "cpu", large) == torch.bfloat16
    assert flow.compute_dtype(None, "cuda", 135_000_000) == torch.bfloat16


def test_stored_bytes_count_tied_weights_once(tmp_path):
    tied, _ = load_original(Source(save_model(tmp_path / "t", tied=True), None, ""))
    untied, _ = load_original(Source(save_model(tmp_path / "u"), None, ""))
    assert flow.stored_nbytes(untied) - flow.stored_nbytes(tied) == 320 * 128 * 2


def test_the_tables_hold_the_numbers():
    outcome = Outcome(original=measured(10.0), quantized=measured(10.4, "an answer"), layers=7)
    outcome.text_pinned = False
    console = Console(width=200, record=True, file=io.StringIO())
    report.print_outcome(console, outcome, FORMATS["MXFP8"], "cpu")
    text = console.export_text()
    assert "1.0400" in text
    assert "an answer" in text
    assert "7 layers quantized to MXFP8" in text
    assert "worded differently" in text
    rows = {
        name: next(line for line in text.splitlines() if f" {name} " in line) for name in FORMATS
    }
    calibration = {name: row.split("│")[5].strip() for name, row in rows.items()}
    assert calibration == {
        "FP8": "required",
        "FP8_PER_CHANNEL_PER_TOKEN": "none",
        "FP8_PB_WO": "none",
        "NVFP4": "required",
        "MXFP8": "none",
    }
    assert "E2M1, 4 bit" in rows["NVFP4"]
    assert "E4M3, one per 16; fp32, one per weight" in rows["NVFP4"]
    assert "reference" in rows["FP8"]
