"""How much of a weight its quantization lost."""

from __future__ import annotations

import math

from torch import Tensor


class SignalToNoise:
    """Signal to quantization noise, SQNR = 10 log10(sum of w^2 / sum of (w - q)^2), by pieces."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, original: Tensor, quantized: Tensor) -> SignalToNoise:
        """Count one more piece.

        Args:
            original: values before, any shape and float dtype.
            quantized: the values that their codes stand for, of the same shape; fp32.

        Returns:
            Itself.
        """
        original = original.to(quantized.device, quantized.dtype)
        self._signal += _energy(original)
        self._noise += _energy(original - quantized)
        return self

    @property
    def decibels(self) -> float:
        """Infinite where nothing was lost, minus infinity where something came of nothing."""
        if not self._noise:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal else -math.inf


def _energy(values: Tensor) -> float:
    return float(values.double().square_().sum())


def stored_decibels(decibels: float) -> float | None:
    """As JSON has it, which knows no infinity."""
    return round(decibels, 3) if math.isfinite(decibels) else None
