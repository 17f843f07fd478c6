"""How a model or a folder was quantized: what reports and exports know of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import nn

from mokernels.formats import Format

RECORD = "_mokernels_quantization"
"""Attribute of a model that was quantized here: its :class:`Quantization`."""


@dataclass
class Quantization:
    """How a model was quantized.

    Attributes:
        config: the configuration in a few words.
        layers: format of every quantized layer, by name.
        exclude: patterns of the modules that stayed plain.
        kv_cache: algorithm of the KV cache, or None.
        amax: of the activations of every calibrated layer, by name.
        noise: signal to quantization noise of every weight in dB, by name.
        filled: layers that saw no data and whose amax was made up.
        batches: calls of the model while calibrating.
        extra: what others add, for the report.
    """

    config: str
    layers: Mapping[str, Format]
    exclude: tuple[str, ...]
    kv_cache: str | None = None
    amax: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    noise: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    filled: tuple[str, ...] = ()
    batches: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def formats(self) -> tuple[Format, ...]:
        """The formats of the layers, each once."""
        return tuple(dict.fromkeys(self.layers.values()))


def quantization_of(model: nn.Module) -> Quantization | None:
    """The record of a model that was quantized in this process, or None."""
    record = getattr(model, RECORD, None)
    return record if isinstance(record, Quantization) else None
