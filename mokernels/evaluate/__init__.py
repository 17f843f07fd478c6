"""Two models side by side: how far their weights are apart, and their predictions of a text."""

from mokernels.evaluate.compare import Comparison, compare
from mokernels.evaluate.held_back import HeldBack
from mokernels.evaluate.predictions import Predictions
from mokernels.evaluate.weights import LayerError, WeightErrors

__all__ = ["Comparison", "HeldBack", "LayerError", "Predictions", "WeightErrors", "compare"]
