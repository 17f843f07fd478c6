"""Calibration: the data that a model is shown, and what is remembered of its activations."""

from mokernels.calibration.data import text
from mokernels.calibration.loop import ForwardLoop, run_batches
from mokernels.calibration.observers import AmaxObserver, make_observer

__all__ = ["AmaxObserver", "ForwardLoop", "make_observer", "run_batches", "text"]
