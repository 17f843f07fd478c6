"""Quantizing a model in place: rehearse, calibrate, convert."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from mokernels.calibration.loop import ForwardLoop, Progress, run_batches
from mokernels.calibration.observers import AmaxObserver, make_observer
from mokernels.calibration.watch import Watch, fill_unseen
from mokernels.errors import ArgumentError, CalibrationError
from mokernels.formats import Format
from mokernels.layers import attach_kv_scales, finish_loading
from mokernels.layers.linear import StoredSpec
from mokernels.ptq.config import QuantizeConfig, parse_config
from mokernels.ptq.convert import convert_layers, fused_groups, is_calibrated
from mokernels.ptq.record import RECORD, Quantization
from mokernels.ptq.rehearse import (
    check_destination,
    check_weights,
    checkpoint_nbytes,
    choose_layers,
    excluded_patterns,
)
from mokernels.ptq.state import CalibrationState, fingerprint
from mokernels.ptq.trainable import check_resident, fake_quantize_layers

logger = logging.getLogger("mokernels")

KV_MAX = 448.0
"""k_scale and v_scale are amax / 448, for NVFP4 caches too."""

KeyValueWatch = Callable[[nn.Module, Mapping[str, AmaxObserver]], AbstractContextManager[object]]
"""Makes a context in which keys and values are observed, by the name of their projection."""


def quantize_model(
    model: nn.Module,
    config: str | Mapping[str, Any],
    forward_loop: ForwardLoop | None = None,
    *,
    exclude: Iterable[str] = (),
    kv_cache: str | None = None,
    observer: str | Mapping[str, Any] = "max",
    unseen: str | float = "error",
    resume: str | os.PathLike[str] | None = None,
    out_dir: str | os.PathLike[str] | None = None,
    trainable: bool = False,
    progress: Callable[[str], AbstractContextManager[Progress]] | None = None,
    watch_kv: KeyValueWatch | None = None,
    shared_amax: Iterable[Sequence[str]] = (),
) -> Quantization:
    """Quantize any module; see :func:`mokernels.quantize`, which knows transformers' models.

    Args:
        model: changed in place, once calibration has succeeded.
        config: see :func:`mokernels.quantize`.
        forward_loop: likewise.
        exclude: likewise.
        kv_cache: likewise.
        observer: likewise.
        unseen: likewise.
        resume: likewise.
        out_dir: likewise.
        trainable: likewise.
        progress: makes a context for a step of a name, which gives a function (done, total).
        watch_kv: how to observe keys and values; without it no KV cache can be calibrated.
        shared_amax: groups of names of layers whose activations get one amax, the largest.

    Raises:
        ArgumentError: an argument is wrong, or the model cannot be quantized so.
        CalibrationError: calibration cannot give every layer a scale.
    """
    progress = progress or silent
    wanted = parse_config(config, exclude=exclude, kv_cache=kv_cache)
    chosen = choose_layers(model, wanted)
    excluded = excluded_patterns(model, chosen)
    _check_fill(unseen)
    check_weights(model, chosen)
    if trainable:
        check_resident(model, chosen)
    if out_dir is not None:
        check_destination(out_dir, checkpoint_nbytes(model, chosen))
    observers = {
        name: make_observer(observer, row.activation)
        for name, row in chosen.items()
        if is_calibrated(row)
    }
    kv_observers = _kv_observers(model, wanted, watch_kv)
    seen = _Calibration(model, chosen, observers, kv_observers, watch_kv)
    if observers or kv_observers:
        settings = {"config": wanted.text, "observer": observer, "layers": sorted(observers)}
        seen.run(forward_loop, resume, fingerprint(model, settings), progress)
    shared_amax = list(shared_amax)
    filled = fill_unseen(observers, unseen, shared_amax)
    fill_unseen(kv_observers, "error")
    amax = _amax_of(observers, shared_amax)
    _warn_of_zeros(amax)
    install = fake_quantize_layers if trainable else convert_layers
    with progress("quantize weights") as advance:
        noise = install(model, chosen, amax, seen.groups(), advance)
    _store_kv_scales(model, kv_observers)
    finish_loading(model)
    record = Quantization(
        config=wanted.text,
        layers=chosen,
        exclude=tuple(excluded),
        kv_cache=wanted.kv_cache,
        amax=amax,
        noise=noise,
        filled=tuple(filled),
        batches=seen.calls,
    )
    setattr(model, RECORD, record)
    return record


def _amax_of(
    observers: Mapping[str, AmaxObserver], groups: Iterable[Sequence[str]]
) -> dict[str, float]:
    """What was observed, by name; the largest of a group for each of its layers."""
    amax = {name: observer.result() for name, observer in observers.items()}
    for group in groups:
        present = [name for name in group if name in amax]
        if present:
            amax.update(dict.fromkeys(present, max(amax[name] for name in present)))
    return amax


class _Calibration:
    """One run of the data through the model."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Mapping[str, Format],
        observers: Mapping[str, AmaxObserver],
        kv_observers: Mapping[str, AmaxObserver],
        watch_kv: KeyValueWatch | None,
    ) -> None:
        self.calls = 0
        self._model = model
        self._chosen = chosen
        self._observers = observers
        self._kv_observers = kv_observers
        self._watch_kv = watch_kv
        self._shared: list[tuple[str, ...]] = []

    def run(
        self,
        forward_loop: ForwardLoop | None,
        resume: str | os.PathLike[str] | None,
        digest: str,
        progress: Callable[[str], AbstractContextManager[Progress]],
    ) -> None:
        if forward_loop is None:
            raise CalibrationError(
                f"{_formats(self._chosen)} needs calibrated activation scales, and no forward_loop "
                "was given. Give a function that calls the model on your data, or batches: "
                "mokernels.calibration.text makes them of a file."
            )
        if resume is not None and callable(forward_loop):
            raise ArgumentError(
                "resume= needs batches, which can be counted; forward_loop is a function. Give the "
                "batches themselves as forward_loop."
            )
        everything = {**self._observers, **_labelled(self._kv_observers)}
        state = CalibrationState(resume, digest, everything)
        layers = {name: self._model.get_submodule(name) for name in self._chosen}
        watch = Watch(self._model, layers, self._observers, self._kv_observers)
        keys = self._watch_kv if self._kv_observers else None
        was_training = self._model.training
        self._model.eval()
        try:
            with watch, keys(self._model, self._kv_observers) if keys else nullcontext():
                self._call(forward_loop, state, progress)
        finally:
            state.write()
            self._model.train(was_training)
        self.calls, self._shared = state.done + watch.calls * (state.done == 0), watch.groups
        if not self.calls:
            raise CalibrationError(
                "The calibration loop never called the model, so that no layer saw data. It is "
                "given the model as its argument and has to call it: model(**batch)."
            )

    def _call(
        self,
        forward_loop: ForwardLoop,
        state: CalibrationState,
        progress: Callable[[str], AbstractContextManager[Progress]],
    ) -> None:
        with progress("calibrate") as advance:
            if callable(forward_loop):
                with torch.no_grad():
                    forward_loop(self._model)
            else:
                run_batches(
                    self._model, forward_loop, skip=state.done, done=state.advance, progress=advance
                )

    def groups(self) -> Sequence[Sequence[str]]:
        """Layers that share an input: as it was seen, or else by their names."""
        seen = {name for group in self._shared for name in group}
        unseen = {name: row for name, row in self._chosen.items() if name not in seen}
        return [*self._shared, *fused_groups(unseen)]


def _kv_observers(
    model: nn.Module, config: QuantizeConfig, watch: KeyValueWatch | None
) -> dict[str, AmaxObserver]:
    """An observer for the keys and one for the values of every attention, by projection."""
    if config.kv_cache is None:
        return {}
    found = {
        name: AmaxObserver()
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in ("k_proj", "v_proj")
    }
    if watch is None or not found:
        raise ArgumentError(
            f"kv_cache={config.kv_cache!r} cannot be calibrated on {type(model).__name__}: it has "
            "no attention of transformers with projections called k_proj and v_proj. Leave it out."
        )
    return found


def _store_kv_scales(model: nn.Module, observers: Mapping[str, AmaxObserver]) -> None:
    for name, observer in observers.items():
        module, leaf = model.get_submodule(name), f"{name.rpartition('.')[2][0]}_scale"
        attach_kv_scales(module, {leaf: StoredSpec(torch.float32, ())})
        scale = torch.tensor(observer.result(), dtype=torch.float32) / KV_MAX
        device = getattr(module, leaf).device
        # Beside an offloaded weight there is nothing to copy into; nor does anything bring it back.
        setattr(module, leaf, scale.to("cpu" if device.type == "meta" else device))


def _labelled(observers: Mapping[str, AmaxObserver]) -> dict[str, AmaxObserver]:
    """Names that differ from those of the layers' own inputs."""
    return {f"{name} (cache)": observer for name, observer in observers.items()}


def _check_fill(unseen: str | float) -> None:
    number = isinstance(unseen, (int, float)) and not isinstance(unseen, bool) and unseen > 0
    if not number and unseen not in ("error", "max"):
        raise ArgumentError(
            f"unseen={unseen!r} is not known, wanted 'error', 'max' or an amax above 0."
        )


def _warn_of_zeros(amax: Mapping[str, float]) -> None:
    zeros = [name for name, value in amax.items() if value == 0]
    if zeros:
        logger.warning(
            "%d layers saw only zeros while calibrating (%s); their activation scales count as "
            "those of ModelOpt's default amax.",
            len(zeros),
            ", ".join(zeros[:3]),
        )


def _formats(chosen: Mapping[str, Format]) -> str:
    names = {row.name for row in chosen.values() if is_calibrated(row)}
    return " and ".join(sorted(names)) or "The KV cache"


@contextmanager
def silent(step: str) -> Iterator[Progress]:
    """No progress bar."""
    yield lambda done, total: None
