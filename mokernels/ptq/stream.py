"""Quantizing a folder of plain weights without a model, a piece of a tensor in memory at a time."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mokernels.calibration.loop import Progress
from mokernels.checkpoint.atomic import new_folder, write_bytes, write_json
from mokernels.checkpoint.audit import check
from mokernels.checkpoint.config import CONFIG_FILE, QUANT_CONFIG_FILE
from mokernels.checkpoint.dequantize import COPIED_SUFFIXES
from mokernels.checkpoint.files import open_regular, resolve
from mokernels.checkpoint.layout import flat_layout, nested_layout
from mokernels.checkpoint.reader import INDEX_FILE, Checkpoint, open_checkpoint
from mokernels.checkpoint.schema import QuantizationConfig
from mokernels.checkpoint.stream import Promise, split_shards, write_shard
from mokernels.checkpoint.weights import quantize_weight
from mokernels.checkpoint.writer import name_shards
from mokernels.errors import ArgumentError, CheckpointError
from mokernels.formats import FP8_BLOCK, Activation, Format, Granularity
from mokernels.layers import stored_weight
from mokernels.numerics.noise import SignalToNoise
from mokernels.ptq.config import QuantizeConfig, parse_config
from mokernels.ptq.convert import fused_groups, one_scale
from mokernels.ptq.record import Quantization
from mokernels.ptq.rehearse import check_destination, no_scale
from mokernels.ptq.report import REPORT_FILE, write_report
from mokernels.ptq.source import Choice, choose, read_plain_config

logger = logging.getLogger("mokernels")

_NOT_COPIED = frozenset({CONFIG_FILE, QUANT_CONFIG_FILE, INDEX_FILE, REPORT_FILE})
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", re.IGNORECASE)


def quantize_folder(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    config: str | Mapping[str, Any],
    *,
    exclude: Iterable[str] = (),
    max_shard_size: int | str = "10GB",
    device: str | torch.device = "cpu",
    progress: Progress = lambda done, total: None,
) -> Path:
    """Quantize a folder; see :func:`mokernels.quantize_checkpoint`.

    ``progress`` is called with the number of tensors written, and of all.
    """
    wanted = parse_config(config, exclude=exclude)
    limit = parse_size(max_shard_size)
    target = Path(out_dir)
    content = read_plain_config(Path(path))
    with open_checkpoint(path, config=QuantizationConfig()) as checkpoint:
        choice = choose(checkpoint, content, wanted)
        row = _one_format(choice, wanted)
        companions = _companions(checkpoint.path)
        work = _Work(checkpoint, choice.layers, torch.device(device))
        check_destination(target, sum(promise.nbytes for promise in work.promises.values()))
        _tell(row)
        with new_folder(target) as partial:
            _write_shards(partial, work, limit, progress)
            section = flat_layout(row, choice.exclude, None, static=False)
            write_json(partial, CONFIG_FILE, {**content, "quantization_config": section})
            write_json(partial, QUANT_CONFIG_FILE, nested_layout(row, choice.exclude, None))
            for name in companions:
                with open_regular(checkpoint.path, name) as file:
                    write_bytes(partial / name, file.read())
            errors = check(partial, values="scales").errors
            if errors:
                raise CheckpointError(target, errors)
            layers, noise = choice.layers, work.noise()
            write_report(partial, Quantization(wanted.text, layers, choice.exclude, noise=noise))
    return target


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``"10GB"`` (10**10) or a number.

    Raises:
        ArgumentError: it is neither, or nothing fits.
    """
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    number = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if found:
        unit = found[2].upper()
        number = int(float(found[1]) * _UNITS[unit if unit in _UNITS else f"{unit}B"])
    if number <= 0:
        raise ArgumentError(f"max_shard_size is {size!r}, wanted bytes above 0, or as '10GB'.")
    return number


class _Work:
    """The tensors that will be written, and how each is made.

    Args:
        checkpoint: the plain one.
        layers: format of the layers to quantize.
        device: where to compute.

    Attributes:
        promises: every tensor to write, in the order of the files; scales follow their codes.
    """

    def __init__(
        self, checkpoint: Checkpoint, layers: Mapping[str, Format], device: torch.device
    ) -> None:
        self._checkpoint, self._layers, self._device = checkpoint, layers, device
        self._shared = {name: group for group in fused_groups(layers) for name in group}
        self._amax: dict[tuple[str, ...], Tensor] = {}
        self._scales: dict[str, list[Tensor]] = {}
        self._noise: dict[str, SignalToNoise] = {}
        self.promises: dict[str, Promise] = {}
        for name, info in checkpoint.tensors.items():
            layer = name.removesuffix(".weight")
            if not (name.endswith(".weight") and layer in layers):
                self.promises[name] = Promise(info.dtype, tuple(info.shape))
                continue
            for spec in layers[layer].tensors(*info.shape):
                if spec.required:
                    self.promises[f"{layer}.{spec.leaf}"] = Promise(spec.dtype, spec.shapes[0])

    def pieces(self, name: str) -> Iterator[Tensor]:
        """One of the promised tensors in pieces; each once, in their order."""
        layer, _, leaf = name.rpartition(".")
        if name in self._scales:
            yield from self._scales.pop(name)
        elif leaf == "weight" and layer in self._layers:
            yield from self._codes(layer)
        else:
            yield from self._read(name)

    def noise(self) -> dict[str, float]:
        """Signal to quantization noise of every weight whose pieces were taken, in dB, by name."""
        return {layer: noise.decibels for layer, noise in self._noise.items()}

    def _codes(self, layer: str) -> Iterator[Tensor]:
        row = self._layers[layer]
        noise = self._noise[layer] = SignalToNoise()
        amax = self._weight_amax(layer, row)
        scales = self._scales.setdefault(f"{layer}.weight_scale", [])
        for piece in self._read(f"{layer}.weight", FP8_BLOCK):
            weight = piece.to(self._device)
            if not bool(weight.isfinite().all()):
                raise no_scale(layer)
            shared = None if amax is None else amax.to(self._device)
            stored = quantize_weight(row, weight, weight_amax=shared)
            if row.granularity is not Granularity.TENSOR or not scales:
                scales.append(stored["weight_scale"].cpu())
            n, k = weight.shape
            noise.add(weight, stored_weight(row, stored, (n, k)))
            yield stored["weight"].cpu()

    def _weight_amax(self, layer: str, row: Format) -> Tensor | None:
        """The amax that the pieces of a weight share, or None where each piece has its own."""
        group = self._shared.get(layer, (layer,))
        first = self._checkpoint.tensors[f"{group[0]}.weight"].shape
        if len(group) == 1 or not one_scale(row, first, group[0]):
            return self._largest((layer,)) if row.granularity is Granularity.TENSOR else None
        if group not in self._amax:
            self._amax[group] = self._largest(group)
        return self._amax[group]

    def _largest(self, group: Iterable[str]) -> Tensor:
        found = []
        for layer in group:
            for piece in self._read(f"{layer}.weight"):
                if not bool(piece.isfinite().all()):
                    raise no_scale(layer)
                found.append(piece.abs().amax().float())
        return torch.stack(found).amax()

    def _read(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        for _, piece in self._checkpoint.chunks(name, multiple):
            yield piece
            # An open file is mapped, and what was read of it counts as memory until it is closed.
            self._checkpoint.close()


def _write_shards(folder: Path, work: _Work, limit: int, progress: Progress) -> None:
    written: list[tuple[Path, dict[str, int]]] = []
    done = 0

    def pieces(name: str) -> Iterator[Tensor]:
        nonlocal done
        yield from work.pieces(name)
        done += 1
        progress(done, len(work.promises))

    for shard in split_shards(work.promises, limit):
        path = folder / f"{len(written)}.safetensors"
        write_shard(path, shard, pieces)
        written.append((path, {name: promise.nbytes for name, promise in shard.items()}))
    name_shards(folder, written)


def _one_format(choice: Choice, wanted: QuantizeConfig) -> Format:
    """The format of all layers, if it can be written without data."""
    if wanted.kv_cache is not None:
        raise ArgumentError(
            "The configuration asks for scales of the KV cache, which need data. Leave them out, "
            "or quantize the loaded model with mokernels.quantize."
        )
    rows = list(dict.fromkeys(choice.layers.values()))
    if len(rows) > 1:
        raise ArgumentError(
            f"The configuration gives layers the formats {', '.join(row.name for row in rows)}; "
            "a checkpoint that is quantized without its model has one. Choose one format."
        )
    (row,) = rows
    if row.second_scale:
        raise ArgumentError(
            f"{row.name} needs calibrated activation scales, and nothing calibrates a folder. "
            "Choose FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, MXFP8 or FP8, or load the model and use "
            "mokernels.quantize."
        )
    return row


def _tell(row: Format) -> None:
    if row.activation is Activation.FP8_STATIC:
        logger.warning(
            "%s is written without input scales, which need data: activations will be quantized "
            "with one dynamic scale per token.",
            row.name,
        )


def _companions(folder: Path) -> list[str]:
    """The tokenizer's files and other small ones, each found to be readable."""
    names = [
        name
        for name in sorted(os.listdir(folder))
        if name.endswith(COPIED_SUFFIXES)
        and not name.endswith(".index.json")
        and name not in _NOT_COPIED
        and not (folder / name).is_dir()
    ]
    for name in names:
        resolve(folder, name)
    return names
