"""What two models predict for each token of a text; one model is in memory at a time."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mokernels.demo.perplexity import perplexity, windows
from mokernels.errors import ArgumentError
from mokernels.hf.auto import load_model, load_tokenizer


@dataclass(frozen=True)
class Predictions:
    """Predictions of the tokens of a text, each from those before it in its window.

    Attributes:
        tokens: number of tokens that were predicted.
        perplexities: of the two models.
        kl: mean Kullback-Leibler divergence of the second model's distribution from the first's, in
            nats per token.
        agreement: share of the tokens for which both find the same token likeliest.
        window: tokens that a model saw at once.
    """

    tokens: int
    perplexities: tuple[float, float]
    kl: float
    agreement: float
    window: int

    @property
    def ratio(self) -> float:
        """The second model's perplexity relative to the first's."""
        return self.perplexities[1] / self.perplexities[0]


@dataclass(frozen=True)
class Setting:
    """How the models run.

    Attributes:
        device: of both.
        dtype: of what is not quantized.
        activations: of the quantized ones, see :func:`mokernels.from_pretrained`.
        window: tokens that a model sees at once; windows do not overlap.
        windows: of the text's beginning, at most.
        batch: windows that go through a model together.
    """

    device: str
    dtype: Any
    activations: str = "checkpoint"
    window: int = 512
    windows: int = 8
    batch: int = 4


def compare_predictions(
    a: Path,
    b: Path,
    text: str,
    setting: Setting,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Predictions:
    """Compare two models' predictions of a text; the first's logits are kept on the disk meanwhile.

    Args:
        a: folder of the reference.
        b: folder of the model that is compared with it.
        text: at least two tokens long.
        setting: how they run.
        progress: called with the number of windows done and of all, both models counted.

    Raises:
        ArgumentError: the tokenizers or the vocabularies differ, there is none, or the text is too
            short.
        CheckpointError: one of the models cannot be loaded.
    """
    tokens = shared_tokens(a, b, text)[: setting.window * setting.windows].to(setting.device)
    total = 2 * len(windows(len(tokens), setting.window, setting.window))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    progress(0, total)
    with tempfile.TemporaryDirectory(prefix="mokernels-compare-") as scratch:
        recorded = Recorded(_load(a, setting), Path(scratch))
        first = _perplexity(recorded, tokens, setting, advance)
        del recorded
        gc.collect()  # the first model may be held by a cycle
        against = Against(_load(b, setting), Path(scratch))
        second = _perplexity(against, tokens, setting, advance)
    count = second.tokens
    values = first.value, second.value
    return Predictions(count, values, against.kl / count, against.agreed / count, setting.window)


def shared_tokens(a: Path, b: Path, text: str) -> Tensor:
    """Token ids int64 [T] of a text by the tokenizer of both models, or of the one that has one.

    Raises:
        ArgumentError: neither has a tokenizer, or theirs make different tokens of the text.
    """
    found: list[list[int]] = []
    for folder in (a, b):
        try:
            tokenizer = load_tokenizer(folder, instead="")
        except ArgumentError:
            if folder == b and not found:
                raise
            continue
        found.append(tokenizer(text, verbose=False)["input_ids"])
    if found[0] != found[-1]:
        raise ArgumentError(
            f"The tokenizers of {str(a)!r} and {str(b)!r} make different tokens of the text. "
            "Compare a model with its own quantization, or compare the weights alone."
        )
    return torch.tensor(found[0], dtype=torch.long)


class Recorded:
    """A model whose logits are written to a folder, one file for each batch."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._model, self._folder, self._count = model, folder, 0

    def __call__(self, **inputs: Any) -> Any:
        """As the model."""
        output = self._model(**inputs)
        logits = output.logits.cpu().contiguous()
        save_file({"logits": logits}, self._folder / f"{self._count}.safetensors")
        self._count += 1
        return output


class Against:
    """A model whose logits are compared with those that another one has left in a folder.

    Attributes:
        kl: sum of the divergences of all predictions, in nats.
        agreed: number of predictions with the same likeliest token.
    """

    def __init__(self, model: Any, folder: Path) -> None:
        self._model, self._folder, self._count = model, folder, 0
        self.kl = 0.0
        self.agreed = 0

    def __call__(self, **inputs: Any) -> Any:
        """As the model."""
        output = self._model(**inputs)
        file = self._folder / f"{self._count}.safetensors"
        reference = load_file(file)["logits"]
        file.unlink()
        self._count += 1
        if reference.shape != output.logits.shape:
            raise ArgumentError(
                f"The vocabularies differ: {reference.shape[-1]} and {output.logits.shape[-1]} "
                "logits for a token. Compare a model with its own quantization."
            )
        for left, right in zip(reference, output.logits, strict=True):
            self._add(left[:-1].to(right.device), right[:-1])  # nothing follows a window's last
        return output

    def _add(self, reference: Tensor, other: Tensor) -> None:
        """Count the predictions of one window, logits [T, V]."""
        expected, found = reference.float().log_softmax(-1), other.float().log_softmax(-1)
        divergence = (expected.exp() * (expected - found)).sum(-1)
        self.kl += float(divergence.sum(dtype=torch.float64))
        self.agreed += int((expected.argmax(-1) == found.argmax(-1)).sum())


def _load(folder: Path, setting: Setting) -> Any:
    from mokernels.checkpoint import looks_quantized

    activations = setting.activations if looks_quantized(folder) else "checkpoint"
    return load_model(
        folder, activations=activations, dtype=setting.dtype, device_map=setting.device
    )


def _perplexity(
    model: Any, tokens: Tensor, setting: Setting, progress: Callable[[int], None]
) -> Any:
    size = setting.window
    return perplexity(
        model, tokens, window=size, stride=size, batch=setting.batch, progress=progress
    )
