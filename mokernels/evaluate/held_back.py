"""What quantizing a model in place costs, on text that it was not calibrated with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from mokernels.demo.perplexity import perplexity
from mokernels.evaluate.predictions import Against, Predictions, Recorded
from mokernels.layers import QuantizedLinear
from mokernels.ptq.record import quantization_of

_WINDOW = 512
_BATCH = 4


class HeldBack:
    """A context around :func:`mokernels.quantize`; the report then says what was measured.

    ::

        with HeldBack(model, tokens):
            mokernels.quantize(model, "NVFP4", batches)
        mokernels.export(model, "out")

    Args:
        model: called once before it is quantized and once after, on the same tokens.
        tokens: int64 [T], held back from calibration.
        window: tokens that the model sees at once.

    Attributes:
        predictions: of both; None until the context ends.
        clipped: share of each calibrated layer's activations that are beyond its amax, by name.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, window: int = _WINDOW) -> None:
        self.predictions: Predictions | None = None
        self.clipped: dict[str, float] = {}
        self._model = model
        self._tokens = tokens
        self._window = window
        self._stack = ExitStack()
        self._folder = Path()
        self._before = 0.0

    def __enter__(self) -> HeldBack:
        scratch = tempfile.TemporaryDirectory(prefix="mokernels-held-back-")
        self._folder = Path(self._stack.enter_context(scratch))
        self._before = self._perplexity(Recorded(self._model, self._folder)).value
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:
            if error is None:
                self._measure()

    def _measure(self) -> None:
        against = Against(self._model, self._folder)
        with counted_clipping(self._model) as counts:
            after = self._perplexity(against)
        values = self._before, after.value
        self.predictions = Predictions(
            after.tokens,
            values,
            against.kl / after.tokens,
            against.agreed / after.tokens,
            self._window,
        )
        self.clipped = {name: beyond / total for name, (beyond, total) in counts.items() if total}
        record = quantization_of(self._model)
        if record is not None:
            record.extra["held_back"] = self.to_dict()

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON has them."""
        found = self.predictions
        if found is None:
            return {}
        return {
            "tokens": found.tokens,
            "window": found.window,
            "perplexity": found.perplexities[1],
            "perplexity_of_the_original": found.perplexities[0],
            "kl_divergence": found.kl,
            "greedy_agreement": found.agreement,
            "clipped_share": self.clipped,
        }

    def _perplexity(self, model: Any) -> Any:
        size = self._window
        return perplexity(model, self._tokens, window=size, stride=size, batch=_BATCH)


@contextmanager
def counted_clipping(model: nn.Module) -> Iterator[dict[str, list[int]]]:
    """Count, while the model runs, the inputs of each layer that are beyond its calibrated amax.

    Yields:
        [values beyond, values], by the layer's name.
    """
    record = quantization_of(model)
    amax = {} if record is None else record.amax
    counts: dict[str, list[int]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and name in amax:
            counts[name] = [0, 0]
            handles.append(module.register_forward_pre_hook(_counter(counts[name], amax[name])))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _counter(count: list[int], amax: float) -> Any:
    def seen(module: nn.Module, args: tuple[Any, ...]) -> None:
        count[0] += int((args[0].abs() > amax).sum())
        count[1] += args[0].numel()

    return seen
