"""What is known of a quantized model's accuracy, as a file beside the checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mokernels.numerics.noise import stored_decibels
from mokernels.ptq.record import Quantization

REPORT_FILE = "mokernels_report.json"
_VERSION = 1


@dataclass(frozen=True)
class Reload:
    """A comparison of the exported model with what was loaded from the export.

    Attributes:
        tokens: how many tokens both were shown.
        equal: whether their logits have the same bits.
        difference: largest difference of two logits.
    """

    tokens: int
    equal: bool
    difference: float


def write_report(folder: Path, record: Quantization, reload: Reload | None = None) -> None:
    """Write the report of one checkpoint into its folder."""
    (folder / REPORT_FILE).write_text(json.dumps(report_values(record, reload), indent=4))


def report_values(record: Quantization, reload: Reload | None = None) -> dict[str, Any]:
    """The report as JSON values.

    ``layers`` has, for each quantized layer, its format, the weight's signal to quantization noise
    in dB, and the amax of its activations where they are calibrated.
    """
    return {
        "version": _VERSION,
        "config": record.config,
        "kv_cache": record.kv_cache,
        "calibration_calls": record.batches,
        "layers": {name: _layer(record, name) for name in record.layers},
        "excluded": list(record.exclude),
        "saw_no_data": list(record.filled),
        "reload": None if reload is None else vars(reload),
        **record.extra,
    }


def _layer(record: Quantization, name: str) -> dict[str, Any]:
    values: dict[str, Any] = {
        "format": record.layers[name].name,
        "weight_sqnr_db": stored_decibels(record.noise.get(name, math.nan)),
    }
    if name in record.amax:
        values["input_amax"] = record.amax[name]
    return values
