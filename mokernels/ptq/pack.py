"""Turning a trained model into the quantized one that was trained for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from mokernels.calibration.loop import Progress
from mokernels.errors import ArgumentError
from mokernels.layers import finish_loading
from mokernels.ptq.model import silent
from mokernels.ptq.record import Quantization, quantization_of
from mokernels.ptq.rehearse import check_weights
from mokernels.ptq.trainable import is_trainable, pack_layers


def convert_model(
    model: nn.Module, progress: Callable[[str], AbstractContextManager[Progress]] | None = None
) -> Quantization:
    """Replace every fake-quantized layer by the packed one; see :func:`mokernels.convert`.

    Args:
        model: changed in place, once everything was found to be in order.
        progress: makes a context for a step of a name, which gives a function (done, total).

    Raises:
        ArgumentError: no layer is fake-quantized, or one that was is none any more.
        CalibrationError: a weight holds NaN or infinities.
    """
    record = quantization_of(model)
    if record is None or not is_trainable(model):
        raise ArgumentError(
            "convert was given a model without fake-quantized layers. Make one with "
            "mokernels.quantize(model, config, ..., trainable=True), and train that."
        )
    present = {n: row for n, row in record.layers.items() if n in dict(model.named_modules())}
    check_weights(model, present)
    with (progress or silent)("quantize weights") as advance:
        record.noise = pack_layers(model, record.layers, advance)
    finish_loading(model)
    return record
