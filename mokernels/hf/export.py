"""``mokernels.export``: a quantized model of transformers as a checkpoint folder of ModelOpt's."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mokernels.checkpoint.atomic import new_folder, write_json
from mokernels.checkpoint.audit import check
from mokernels.checkpoint.config import CONFIG_FILE, QUANT_CONFIG_FILE
from mokernels.checkpoint.layout import nested_layout
from mokernels.errors import ArgumentError, CheckpointError, MokernelsError
from mokernels.hf.placement import input_device, load_alike, savable
from mokernels.hf.quantize import adopt, as_stored, convert, written_config
from mokernels.ptq.record import Quantization, quantization_of
from mokernels.ptq.report import Reload, write_report
from mokernels.ptq.trainable import is_trainable

_PROBE = (1, 16)
"""Rows and tokens with which a reloaded model is compared to the one that was exported."""


def export(
    model: nn.Module,
    out_dir: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "10GB",
    reload: bool = True,
) -> Path:
    """Write a checkpoint; see :func:`mokernels.export`."""
    record = _record(model)
    with new_folder(Path(out_dir)) as partial:
        if is_trainable(model):
            convert(model, progress=False)
        with _kept_config(model), savable(model):
            adopt(model, record)
            model.save_pretrained(partial, max_shard_size=max_shard_size)  # type: ignore[operator]
        stored = as_stored(model, record)
        _write_config(partial, stored)
        stated = nested_layout(stored.layers, stored.exclude, stored.kv_cache)
        write_json(partial, QUANT_CONFIG_FILE, stated)
        _write_tokenizer(model, tokenizer, partial)
        errors = check(partial, values="scales").errors
        if errors:
            raise CheckpointError(out_dir, errors)
        reloaded = _reload(model, partial) if reload else None
        write_report(partial, record, reloaded)
    return Path(out_dir)


def _write_config(folder: Path, record: Quantization) -> None:
    """Write config.json anew as ModelOpt does, to the byte: its section last, in its own order."""
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text())
    path.unlink()
    del config["quantization_config"]
    write_json(folder, CONFIG_FILE, {**config, "quantization_config": written_config(record)})


def _record(model: nn.Module) -> Quantization:
    record = quantization_of(model)
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            f"export was given a {type(model).__name__}, wanted a model of transformers. Write "
            "other models with mokernels.checkpoint.write_checkpoint."
        )
    if record is None:
        raise ArgumentError(
            "export was given a model that mokernels.quantize has not quantized in this process. "
            "Quantize it first; a model that was loaded quantized is saved by its save_pretrained."
        )
    return record


@contextmanager
def _kept_config(model: Any) -> Iterator[None]:
    """Generation settings that transformers refuses to save are mended for the export alone."""
    kept = getattr(model, "generation_config", None)  # models that generate have one
    try:
        if kept is not None:
            model.generation_config = _savable(kept)
        yield
    finally:
        if kept is not None:
            model.generation_config = kept


def _savable(generation: Any) -> Any:
    """Sampling parameters say that there is sampling; some models are published without."""
    mended = copy.deepcopy(generation)
    try:
        mended.validate(strict=True)
    except ValueError:
        mended.do_sample = True
    return mended


def _write_tokenizer(model: Any, tokenizer: Any, folder: Path) -> None:
    """The tokenizer that was given, or the one that lies beside the original model."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
        return
    source = getattr(model.config, "name_or_path", "") or ""
    if Path(source).is_dir() and any(Path(source).glob("tokenizer*")):
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def _reload(model: Any, folder: Path) -> Reload:
    """Load what was written, and compare its logits with the model's."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, _PROBE, generator=generator).to(input_device(model))
    with TemporaryDirectory() as scratch:
        again = load_alike(model, folder, scratch)
        expected, found = _output(model, ids), _output(again, ids)
    equal = torch.equal(found, expected)
    difference = float((found.float() - expected.float()).abs().max())
    if not equal:
        raise _unequal(folder, difference, _other_buffers(model, again))
    return Reload(ids.numel(), equal, difference)


def _other_buffers(model: nn.Module, again: nn.Module) -> list[str]:
    """Names of the buffers that no checkpoint stores and that differ between the two models."""
    loaded = dict(again.named_buffers())
    return [
        name
        for name, buffer in model.named_buffers()
        if name in loaded and not torch.equal(buffer.cpu(), loaded[name].cpu())
    ]


def _unequal(folder: Path, difference: float, buffers: list[str]) -> MokernelsError:
    text = (
        "The checkpoint does not give the quantized model's logits when it is loaded again: they "
        f"differ by up to {difference:.3g}. Nothing was written, and the model is as it was. "
    )
    if buffers:
        return MokernelsError(
            f"{text}The buffer {buffers[0]!r} is not what the model's class makes: checkpoints do "
            "not store it. Casting a model (model.to(torch.bfloat16), model.half()) rounds it: "
            "load the model in its dtype instead, from_pretrained(..., dtype=torch.bfloat16), or "
            "export with reload=False."
        )
    return MokernelsError(
        f"{text}Is the model's code deterministic? If so, this is a fault of mokernels'; please "
        "report it. reload=False exports without the comparison."
    )


def _output(model: Any, ids: Tensor) -> Tensor:
    """Logits, or what a model without a head returns first."""
    inputs = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    try:
        with torch.no_grad():
            output = model(**inputs)
    except Exception as error:
        raise MokernelsError(
            f"The model was not compared with its checkpoint: {type(model).__name__} does not run "
            f"on input_ids alone ({type(error).__name__}: {error}). Nothing was written, and the "
            "model is as it was. Export it with reload=False."
        ) from error
    logits: Tensor | None = getattr(output, "logits", None)
    return next(iter(output.values())) if logits is None else logits
