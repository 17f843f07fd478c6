"""Two models side by side: how far their weights are apart, and their predictions of a text."""

from mokernels.evaluate.compare import Comparison, compare
from mokernels.evaluate.predictions import Predictions
from mokernels.evaluate.weights import LayerError, WeightErrors

__all__ = ["Comparison", "LayerError", "Predictions", "WeightErrors", "compare"]
