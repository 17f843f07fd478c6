"""The demo from end to end; what it prints is in :mod:`mokernels.demo.report`."""

from __future__ import annotations

import gc
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mokernels import calibration
from mokernels.demo.perplexity import Perplexity, perplexity, windows
from mokernels.demo.source import Source, load_original
from mokernels.demo.text import calibration_texts, reference_text
from mokernels.formats import Format
from mokernels.ptq.convert import is_calibrated

WINDOW = 512
STRIDE = 512
WINDOWS = 8
"""The first 8 x 512 tokens of the text, in windows that do not overlap."""
BATCH = 4
CALIBRATION_SAMPLES = 16
"""Samples of 512 tokens that formats with calibrated activations see."""
RATIO_LIMIT = {1: 1.05, 2: 1.75}
"""Largest perplexity relative to the unquantized model, by the elements in a byte: 4 bits cost a
model of 135 million parameters much more than a large one."""
PROMPT = "Tell me in one sentence what a computer is."
_LARGE_MODEL = 1_000_000_000
"""Parameters from which on a model is not held in float32 on the CPU."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        source: the unquantized model.
        format: to quantize to.
        output: folder for the checkpoint; None for one that is removed in the end.
        prompt: the user's message; answered greedily.
        max_new_tokens: longest answer.
        device: to run on.
    """

    source: Source
    format: Format
    output: Path | None = None
    prompt: str = PROMPT
    max_new_tokens: int = 40
    device: str = "cpu"


@dataclass
class Measured:
    """What is known of one of the two models.

    Attributes:
        nbytes: bytes of its tensors.
        answer: to the prompt.
        tokens_per_second: while answering.
        perplexity: on the pinned text.
    """

    nbytes: int = 0
    answer: str = ""
    tokens_per_second: float = math.nan
    perplexity: Perplexity = field(default_factory=lambda: Perplexity(math.nan, 0))


@dataclass
class Outcome:
    """Everything that the demo found out."""

    original: Measured = field(default_factory=Measured)
    quantized: Measured = field(default_factory=Measured)
    layers: int = 0
    limit: float = RATIO_LIMIT[1]
    text_pinned: bool = True
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Perplexity after quantization, relative to before."""
        return self.quantized.perplexity.value / self.original.perplexity.value

    @property
    def problems(self) -> list[str]:
        """Why the demo failed, as sentences; empty if it did not."""
        found = []
        if not self.quantized.answer.strip():
            found.append("The quantized model's answer to the prompt is empty.")
        if not self.ratio <= self.limit:  # NaN fails too
            found.append(
                f"The quantized model's perplexity is {self.ratio:.4f} times the original's, "
                f"wanted at most {self.limit}."
            )
        return found


class Reporter(Protocol):
    """Where the flow tells what it is doing."""

    def step(self, title: str) -> Any:
        """A context manager around one step; it gives a function (done, total)."""


def run(request: Request, reporter: Reporter) -> Outcome:
    """Measure, calibrate, quantize, export, load, ask and measure again.

    Args:
        request: what to do.
        reporter: is told of every step.

    Raises:
        MokernelsError: a step failed; the temporary folder is removed then too.
    """
    outcome = Outcome(limit=RATIO_LIMIT[request.format.element.per_item])
    with quiet_transformers(), _checkpoint_folder(request.output) as folder:
        tokens = _original(request, folder, outcome, reporter)
        _quantized(request, folder, tokens, outcome, reporter)
    return outcome


def _original(request: Request, folder: Path, outcome: Outcome, reporter: Reporter) -> Tensor:
    """Load, measure, write the checkpoint; returns the text's tokens and forgets the model."""
    with _timed(outcome, reporter, "load the original model"):
        model, tokenizer = load_original(request.source)
        outcome.original.nbytes = stored_nbytes(model)
    tokens = _tokenize(tokenizer, outcome).to(request.device)
    dtype = model.dtype
    model = model.to(request.device, compute_dtype(model, request.device))
    _measure(request, model, tokenizer, tokens, outcome, reporter, "original")
    with torch.no_grad():
        for parameter in model.parameters():  # not model.to(dtype), which rounds fp32 buffers too
            parameter.data = parameter.data.to(dtype)
    _write(request, model, tokenizer, folder, outcome, reporter)
    return tokens


def _write(
    request: Request,
    model: Any,
    tokenizer: Any,
    folder: Path,
    outcome: Outcome,
    reporter: Reporter,
) -> None:
    """Quantize in place and export; what was written is loaded and compared there."""
    import mokernels

    batches = None
    if is_calibrated(request.format):
        texts, samples = calibration_texts(), CALIBRATION_SAMPLES
        batches = calibration.text(tokenizer, texts, samples=samples, length=WINDOW)
    steps = partial(_timed, outcome, reporter)
    mokernels.quantize(model, request.format.name, batches, out_dir=folder, progress=steps)
    with _timed(outcome, reporter, "write the checkpoint, load and compare it"):
        mokernels.export(model, folder, tokenizer=tokenizer)


def _quantized(
    request: Request, folder: Path, tokens: Tensor, outcome: Outcome, reporter: Reporter
) -> None:
    from transformers import AutoTokenizer

    import mokernels

    with _timed(outcome, reporter, "load the checkpoint"):
        gc.collect()  # the original model is still held by a cycle
        report = mokernels.check(folder, values="none")
        outcome.layers = len(report.plan.layers)
        outcome.quantized.nbytes = report.nbytes
        dtype = compute_dtype(None, request.device, outcome.original.nbytes // 2)
        model = mokernels.from_pretrained(folder, dtype=dtype, device_map=request.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    _measure(request, model, tokenizer, tokens, outcome, reporter, "quantized")


def _measure(
    request: Request,
    model: Any,
    tokenizer: Any,
    tokens: Tensor,
    outcome: Outcome,
    reporter: Reporter,
    which: str,
) -> None:
    measured: Measured = getattr(outcome, which)
    with _timed(outcome, reporter, f"answer with the {which} model"):
        begin = time.perf_counter()
        ids = answer_tokens(model, tokenizer, request.prompt, request.max_new_tokens)
        measured.tokens_per_second = len(ids) / (time.perf_counter() - begin)
        measured.answer = tokenizer.decode(ids, skip_special_tokens=True).strip()
    with _timed(outcome, reporter, f"perplexity of the {which} model") as progress:
        measured.perplexity = _perplexity(model, tokens, progress)


def _perplexity(model: Any, tokens: Tensor, progress: Callable[[int, int], None]) -> Perplexity:
    total = len(windows(len(tokens), WINDOW, STRIDE))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    progress(0, total)
    return perplexity(model, tokens, window=WINDOW, stride=STRIDE, batch=BATCH, progress=advance)


def _tokenize(tokenizer: Any, outcome: Outcome) -> Tensor:
    reference = reference_text()
    outcome.text_pinned = reference.pinned
    ids: Tensor = tokenizer(reference.text, return_tensors="pt", verbose=False).input_ids[0]
    return ids[: WINDOW + STRIDE * (WINDOWS - 1)]


def answer_tokens(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> list[int]:
    """Token ids of the greedy answer to one message, through the chat template if there is one."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    length = inputs["input_ids"].shape[1]
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
    ids: list[int] = output[0, length:].tolist()
    return ids


def stored_nbytes(model: torch.nn.Module) -> int:
    """Bytes of a model's tensors as a checkpoint would store them: tied ones once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(tensors.values())


def compute_dtype(model: Any, device: str, parameters: int = 0) -> torch.dtype:
    """float32 on the CPU, where most processors multiply it much faster than bfloat16."""
    count = sum(p.numel() for p in model.parameters()) if model is not None else parameters
    return torch.float32 if device == "cpu" and count < _LARGE_MODEL else torch.bfloat16


@contextmanager
def _checkpoint_folder(output: Path | None) -> Iterator[Path]:
    if output is not None:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="mokernels-demo-") as scratch:
        yield Path(scratch) / "checkpoint"


@contextmanager
def _timed(
    outcome: Outcome, reporter: Reporter, title: str
) -> Iterator[Callable[[int, int], None]]:
    begin = time.perf_counter()
    with reporter.step(title) as progress:
        yield progress
    outcome.seconds[title] = time.perf_counter() - begin


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers; both settings are put back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
