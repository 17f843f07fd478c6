"""What is remembered of the activations that go through a layer: one amax for its scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mokernels.errors import ArgumentError
from mokernels.formats import E4M3_MAX, Activation
from mokernels.numerics import (
    dequantize_fp8,
    dequantize_nvfp4,
    quantize_fp8,
    quantize_nvfp4,
    static_fp8_scales,
)

OBSERVERS = ("max", "percentile", "mse")
_BINS = 2048
_MSE_STEPS = 64
_SAMPLE = 65536
"""Values of the MSE observer's sample: what the histogram says, drawn evenly."""


class AmaxObserver:
    """The largest magnitude seen, as ModelOpt's max calibration; base of the other observers.

    Attributes:
        amax: fp32 [], on the device of what was seen; None before anything was.
        batches: how many tensors were seen.
    """

    def __init__(self) -> None:
        self.amax: Tensor | None = None
        self.batches = 0

    def observe(self, x: Tensor) -> None:
        """Take note of a tensor of any shape; no value of it has to reach the host.

        A NaN or an infinity stays in ``amax`` and is found by :attr:`is_finite`.
        """
        if x.numel() == 0:
            return
        amax = x.detach().abs().amax().float()
        # torch.maximum keeps a NaN of either side.
        self.amax = amax if self.amax is None else torch.maximum(self.amax.to(amax.device), amax)
        self.batches += 1

    @property
    def is_finite(self) -> bool:
        """Whether everything that was seen was finite."""
        return self.amax is None or bool(self.amax.isfinite())

    def result(self) -> float:
        """The amax that the scale is made of; 0 where only zeros were seen."""
        return 0.0 if self.amax is None else float(self.amax)

    def state(self) -> dict[str, Any]:
        """What a later run needs to go on, as JSON values."""
        return {"amax": None if self.amax is None else float(self.amax), "batches": self.batches}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        amax = state["amax"]
        self.amax = None if amax is None else torch.tensor(float(amax))
        self.batches = int(state["batches"])


class HistogramObserver(AmaxObserver):
    """Keeps a histogram of magnitudes, whose range doubles when something larger comes.

    Attributes:
        counts: fp64 [2048], magnitudes in equal bins from 0 to ``limit``.
        limit: upper end of the histogram; 0 before anything but zeros was seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = torch.zeros(_BINS, dtype=torch.float64)
        self.limit = 0.0

    def observe(self, x: Tensor) -> None:
        """Take note of a tensor of any shape."""
        super().observe(x)
        if x.numel() == 0 or not self.is_finite:
            return
        magnitudes = x.detach().abs().float().flatten()
        self._widen(float(magnitudes.amax()))
        if self.limit:
            added = torch.histc(magnitudes, _BINS, 0.0, self.limit)
            self.counts += added.to("cpu", torch.float64)

    def _widen(self, amax: float) -> None:
        if not self.limit:
            self.limit = amax
        while amax > self.limit > 0:
            pairs = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([pairs, torch.zeros_like(pairs)])
            self.limit *= 2

    def state(self) -> dict[str, Any]:
        """What a later run needs to go on, as JSON values."""
        return super().state() | {"counts": self.counts.tolist(), "limit": self.limit}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        super().restore(state)
        self.counts = torch.tensor(state["counts"], dtype=torch.float64)
        self.limit = float(state["limit"])


class PercentileObserver(HistogramObserver):
    """The magnitude that a share of all values does not exceed; the rest saturates.

    Args:
        percentile: the share in per cent, above 0 and at most 100.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        if not 0 < percentile <= 100:
            raise ArgumentError(f"percentile={percentile} is no share, wanted above 0, up to 100.")
        self.percentile = percentile

    def result(self) -> float:
        """The upper end of the bin that holds the percentile, at most the largest magnitude."""
        total = float(self.counts.sum())
        if not total:
            return super().result()
        share = self.counts.cumsum(0) >= total * self.percentile / 100
        index = int(share.to(torch.uint8).argmax())
        return min(super().result(), (index + 1) * self.limit / _BINS)


class MseObserver(HistogramObserver):
    """The amax with the least mean squared error of what the layer's quantization gives back.

    Args:
        activation: how the layer quantizes, static FP8 or NVFP4.
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def result(self) -> float:
        """The best of 64 shares of the largest magnitude."""
        amax = super().result()
        total = self.counts.sum()
        if not total or not amax:
            return amax
        values = self._sample(total)
        candidates = [amax * (step + 1) / _MSE_STEPS for step in range(_MSE_STEPS)]
        errors = [self._error(values, candidate) for candidate in candidates]
        return candidates[min(range(_MSE_STEPS), key=errors.__getitem__)]

    def _sample(self, total: Tensor) -> Tensor:
        """Magnitudes as the histogram has them, in an order without pattern: blocks mix them."""
        places = torch.linspace(0, 1, _SAMPLE, dtype=torch.float64) * total
        bins = torch.searchsorted(self.counts.cumsum(0), places).clamp(max=_BINS - 1)
        values = (bins.double() + 0.5) * self.limit / _BINS
        order = torch.randperm(_SAMPLE, generator=torch.Generator().manual_seed(0))
        return values[order].float()

    def _error(self, values: Tensor, amax: float) -> float:
        scale = torch.tensor(amax, dtype=torch.float32)
        if self.activation is Activation.NVFP4:
            scale = scale / (6 * E4M3_MAX)
            codes, blocks = quantize_nvfp4(values.view(-1, 1024), scale)
            back = dequantize_nvfp4(codes, blocks, scale)
        else:
            multiplier, divisor = static_fp8_scales(scale / E4M3_MAX)
            back = dequantize_fp8(quantize_fp8(values[None], multiplier), divisor)
        return float((back.flatten() - values).square().mean())


def make_observer(method: str | Mapping[str, Any], activation: Activation) -> AmaxObserver:
    """An observer for one layer.

    Args:
        method: ``"max"``, ``"percentile"``, ``"mse"``, or ``{"percentile": 99.9}``.
        activation: how the layer quantizes its input.

    Raises:
        ArgumentError: the method is none of these.
    """
    if isinstance(method, Mapping) and set(method) == {"percentile"}:
        return PercentileObserver(_number(method["percentile"]))
    if method == "max":
        return AmaxObserver()
    if method == "percentile":
        return PercentileObserver()
    if method == "mse":
        return MseObserver(activation)
    raise ArgumentError(
        f"observer={method!r} is not known, wanted one of {', '.join(map(repr, OBSERVERS))} or "
        "{'percentile': 99.9}."
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ArgumentError(f"percentile={value!r} is no number, wanted above 0, up to 100.")
    return float(value)
