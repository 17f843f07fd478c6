"""Watching the inputs of layers while a model runs: their amax, and who shares one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mokernels.calibration.observers import AmaxObserver
from mokernels.errors import CalibrationError


class Watch:
    """A context in which the model's calls are observed; the model is left as it was.

    Args:
        model: whose calls are counted.
        layers: the layers to watch, by name.
        observers: what remembers each watched layer's input; layers without are only looked at to
            see who shares an input.
        others: further observers, filled by somebody else, that have to stay finite too.

    Attributes:
        calls: number of finished calls of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        observers: Mapping[str, AmaxObserver],
        others: Mapping[str, AmaxObserver] | None = None,
    ) -> None:
        self.calls = 0
        self._model = model
        self._layers = layers
        self._observers = observers
        self._others = others or {}
        self._inputs: dict[int, tuple[weakref.ref[Tensor], list[str]]] = {}
        self._takers: list[list[str]] = []
        self._handles: list[RemovableHandle] = []

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Names of the layers that got the same tensor in the first call, two or more each."""
        return [tuple(names) for names in self._takers if len(names) > 1]

    def __enter__(self) -> Watch:
        for name, layer in self._layers.items():
            self._handles.append(
                layer.register_forward_pre_hook(self._hook(name), with_kwargs=True)
            )
        self._handles.append(self._model.register_forward_hook(self._finished))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._inputs.clear()

    def _hook(self, name: str) -> Callable[..., None]:
        observer = self._observers.get(name)

        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor):
                if self.calls == 0:
                    self._share(name, x)
                if observer is not None:
                    observer.observe(x)

        return seen

    def _share(self, name: str, x: Tensor) -> None:
        known = self._inputs.get(id(x))
        # A number that was used for another tensor before, which is gone, is no sign.
        if known is None or known[0]() is not x:
            known = (weakref.ref(x), [])
            self._inputs[id(x)] = known
            self._takers.append(known[1])
        if name not in known[1]:
            known[1].append(name)

    def _finished(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls += 1
        broken = [
            name
            for name, observer in (*self._observers.items(), *self._others.items())
            if not observer.is_finite
        ]
        if broken:
            raise CalibrationError(
                f"The input of the layer {broken[0]!r} holds NaN or infinities in call "
                f"{self.calls} of the model (and so does that of {len(broken) - 1} more). No scale "
                "can be made of that. Check the model in its own dtype on this batch; fp16 models "
                "often overflow where bf16 ones do not."
            )


def unseen(observers: Mapping[str, AmaxObserver]) -> list[str]:
    """Names of the layers whose input nobody saw."""
    return [name for name, observer in observers.items() if observer.amax is None]


def fill_unseen(
    observers: Mapping[str, AmaxObserver],
    fill: str | float,
    groups: Iterable[Sequence[str]] = (),
) -> list[str]:
    """Give layers that saw no data an amax.

    Args:
        observers: of all layers, by name.
        fill: ``"error"``; ``"max"``, the largest of the layers whose name ends alike (the same
            projection of other layers or experts); or an amax.
        groups: names of layers whose amax is one; ``"max"`` looks there first.

    Returns:
        The names of the layers that were filled.

    Raises:
        CalibrationError: a layer saw no data, and ``fill`` gives it nothing.
    """
    missing = unseen(observers)
    if not missing:
        return []
    if fill == "error":
        raise CalibrationError(
            f"{_count(missing)} saw no data while calibrating: {_some(missing)}. Their scales "
            "would be guesses. Give more data (a rare expert needs much), exclude them, or say how "
            'to fill them: unseen="max" takes the largest amax of the same projection elsewhere, '
            "unseen=<number> is an amax."
        )
    beside = {name: group for group in groups for name in group}
    found = {}
    for name in missing:
        if isinstance(fill, (int, float)):
            found[name] = float(fill)
        else:
            near = {other: observers[other] for other in beside.get(name, ()) if other in observers}
            seen = [observer.result() for observer in near.values() if observer.amax is not None]
            found[name] = max(seen) if seen else _largest_alike(name, observers)
    for name, amax in found.items():
        observers[name].restore({"amax": amax, "batches": 0} | _empty(observers[name]))
    return missing


def _largest_alike(name: str, observers: Mapping[str, AmaxObserver]) -> float:
    leaf = name.rpartition(".")[2]
    found = [
        observer.result()
        for other, observer in observers.items()
        if other.rpartition(".")[2] == leaf and observer.amax is not None
    ]
    if not found:
        raise CalibrationError(
            f"The layer {name!r} saw no data while calibrating, and no other layer called {leaf!r} "
            "did. Give data that reaches it, exclude it, or give an amax: unseen=<number>."
        )
    return max(found)


def _empty(observer: AmaxObserver) -> dict[str, Any]:
    state = observer.state()
    return {key: value for key, value in state.items() if key not in ("amax", "batches")}


def _count(names: Iterable[str]) -> str:
    number = len(list(names))
    return f"{number} layer{'s' if number != 1 else ''}"


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
