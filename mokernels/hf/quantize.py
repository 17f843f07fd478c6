"""``mokernels.quantize`` for models of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mokernels.calibration.loop import ForwardLoop, Progress
from mokernels.checkpoint.layout import flat_layout
from mokernels.hf import quantizer
from mokernels.hf.experts import apart, by_container
from mokernels.hf.keys_values import watch_keys_and_values
from mokernels.hf.names import stored_names
from mokernels.hf.quantizer import ModelOptConfig, ModelOptQuantizer, untie
from mokernels.ptq.config import parse_config
from mokernels.ptq.model import quantize_model
from mokernels.ptq.pack import convert_model
from mokernels.ptq.record import Quantization

Steps = Callable[[str], AbstractContextManager[Progress]]


def quantize(
    model: nn.Module,
    config: str | Mapping[str, Any],
    forward_loop: ForwardLoop | None = None,
    *,
    progress: bool | Steps = True,
    **options: Any,
) -> nn.Module:
    """Quantize a model in place; see :func:`mokernels.quantize`, which has the same arguments."""
    if not isinstance(model, PreTrainedModel):
        quantize_model(model, config, forward_loop, progress=_steps(progress), **options)
        return model
    wanted = parse_config(config, exclude=options.get("exclude", ()))
    options["watch_kv"] = watch_keys_and_values
    with apart(model, wanted) as shared:
        record = quantize_model(
            model,
            config,
            forward_loop,
            progress=_steps(progress),
            shared_amax=shared,
            **options,
        )
    # transformers' Trainer refuses models that say they are quantized: those that train do not yet.
    if not options.get("trainable"):
        adopt(model, record)
    return model


def convert(model: nn.Module, *, progress: bool | Steps = True) -> nn.Module:
    """Pack what was trained, in place; see :func:`mokernels.convert`."""
    record = convert_model(model, _steps(progress))
    if isinstance(model, PreTrainedModel):
        adopt(model, record)
    return model


def adopt(model: Any, record: Quantization) -> None:
    """Make a model of transformers look as if its checkpoint had been loaded."""
    quantizer.register()
    config = ModelOptConfig(**written_config(as_stored(model, record)))
    model.config.quantization_config = config
    model.hf_quantizer = ModelOptQuantizer(config, pre_quantized=True)
    untie(model, set(record.layers))


def as_stored(model: nn.Module, record: Quantization) -> Quantization:
    """The record with the names that layers have in files."""
    stored = stored_names(model)
    listed = by_container(model, record.layers)
    layers = {stored(name): row for name, row in listed.items()}
    exclude = tuple(sorted(map(stored, record.exclude)))
    return dataclasses.replace(record, layers=layers, exclude=exclude)


def written_config(record: Quantization) -> dict[str, Any]:
    """``quantization_config`` of config.json, from a record with the names of files."""
    return flat_layout(record.layers, record.exclude, record.kv_cache, static=bool(record.amax))


def _steps(progress: bool | Steps) -> Steps | None:
    return progress if callable(progress) else (_bars if progress else None)


@contextmanager
def _bars(step: str) -> Iterator[Progress]:
    """A progress bar with the time that is left."""
    with tqdm(desc=step, dynamic_ncols=True) as bar:

        def advance(done: int, total: int | None) -> None:
            if bar.total != total:
                bar.reset(total)
            bar.update(done - bar.n)

        yield advance
