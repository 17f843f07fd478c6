"""What is kept of a model between generations, and a model while it generates.

While ``model.generate`` runs, the model's layers are compiled and ``model.forward`` is ours: it
lets prompts through, and hands steps of one token to a captured step. Afterwards the model is as it
was. Compiled code, caches and captured steps stay with the model's :class:`Session`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from mokernels.compile.regional import HowToCompile, Regions, attached_regions, decompile_layers
from mokernels.compile.step import Capture, Steps
from mokernels.errors import ArgumentError
from mokernels.hf.static_cache import CACHE_NAME, KeptCache
from mokernels.invariance import is_batch_invariant

KEPT = 2
"""Caches that a model keeps, each with its captured steps: the last ones used."""

_SESSIONS: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


class Session:
    """Compiled code, caches and captured steps of one model; it does not refer to the model."""

    def __init__(self) -> None:
        self._regions: Regions | None = None
        self._kept: OrderedDict[Hashable, tuple[KeptCache, Steps | None]] = OrderedDict()
        self._weights: Hashable = None
        self._lock = threading.RLock()
        self._busy = False

    @contextmanager
    def use(self) -> Iterator[None]:
        """Let one thread in at a time; the caches are written by whoever generates.

        Raises:
            ArgumentError: this thread is inside already.
        """
        with self._lock:
            if self._busy:
                raise ArgumentError(
                    "mokernels.generate was called for a model that is generating already (from a "
                    "streamer, a logits processor or a stopping criterion). Call model.generate "
                    "there."
                )
            self._busy = True
            try:
                yield
            finally:
                self._busy = False

    def cache(
        self, model: Any, rows: int, length: int, capture: Capture | None
    ) -> tuple[KeptCache, Steps | None]:
        """An empty cache of that size, and the captured steps that refer to it.

        Args:
            model: the session's.
            rows: of the batch.
            length: tokens.
            capture: records steps; None for steps that are not captured.
        """
        weights = weights_in_place(model)
        if weights != self._weights:
            self._kept.clear()
            self._weights = weights
        # Captured steps replay the kernels of the mode that they were captured in.
        key = (rows, length, capture is not None, is_batch_invariant())
        if key not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            steps = None if capture is None else Steps(capture)
            self._kept[key] = KeptCache(model, rows, length), steps
        self._kept.move_to_end(key)
        self._kept[key][0].cache.reset()
        return self._kept[key]

    def give_away(self, kept: KeptCache) -> None:
        """Forget a cache, which is somebody else's from now on."""
        for key in [key for key, (mine, _) in self._kept.items() if mine is kept]:
            del self._kept[key]

    @contextmanager
    def compiled(self, model: nn.Module) -> Iterator[None]:
        """Let the model's layers run compiled; those that are compiled already stay as they are."""
        if attached_regions(model) is not None:
            yield
            return
        self._regions = self._regions or Regions(HowToCompile())
        self._regions.attach(model)
        try:
            yield
        finally:
            decompile_layers(model)


def session_of(model: nn.Module) -> Session:
    """What is kept of this model."""
    if model not in _SESSIONS:
        _SESSIONS[model] = Session()
    return _SESSIONS[model]


def release(model: nn.Module) -> None:
    """Give back the memory of the caches and captured steps that generations left for the next.

    Args:
        model: any; call it after changing a model in a way that leaves its weights where they are
            (adapters switched off, other attention), or before loading the next one.
    """
    _SESSIONS.pop(model, None)


def weights_in_place(model: nn.Module) -> Hashable:
    """Changes when a weight is moved, replaced or cast: captured steps read it by its address."""
    tensors = [*model.parameters(), *model.buffers()]
    places = tuple((tensor.data_ptr(), tensor.dtype) for tensor in tensors)
    return (places, model.device, model.config._attn_implementation)


def generate_with(
    model: Any,
    arguments: Mapping[str, Any],
    size: tuple[int, int],
    *,
    compile: bool,
    capture: Capture | None,
) -> Any:
    """``model.generate`` with a kept cache, compiled layers and captured steps.

    Args:
        model: a decoder.
        arguments: of ``model.generate``.
        size: rows and tokens of the cache.
        compile: whether the layers run compiled.
        capture: records a step of one token; None leaves steps as they are.
    """
    session = session_of(model)
    with ExitStack() as stack:
        stack.enter_context(session.use())
        # A cache is written by later calls too: it must not belong to a mode that they are not in.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        kept, steps = session.cache(model, *size, capture)
        if compile:
            stack.enter_context(session.compiled(model))
        if steps is not None:
            stack.enter_context(replaced_forward(model, stepping_forward(model, kept, steps)))
        output = model.generate(
            **arguments, **{CACHE_NAME: kept.cache}, cache_implementation=None, disable_compile=True
        )
        if not isinstance(output, torch.Tensor):
            session.give_away(kept)
    return output


def stepping_forward(model: Any, kept: KeptCache, steps: Steps) -> Callable[..., Any]:
    """The model's forward, with steps of one token on ``kept`` replayed."""
    forward = model.forward

    def on_the_cache(**kwargs: Any) -> Any:
        return forward(**kwargs, **{CACHE_NAME: kept.cache})

    @wraps(forward)
    def stepping(*args: Any, **kwargs: Any) -> Any:
        tokens = kwargs.get("input_ids")
        own = kwargs.get(CACHE_NAME) is kept.cache
        if args or not own or tokens is None or tokens.shape[1] != 1:
            return forward(*args, **kwargs)
        del kwargs[CACHE_NAME]
        output = steps(on_the_cache, kwargs, kept.mode(), kept.rewinder)
        kept.count_step()
        return output

    return stepping


@contextmanager
def replaced_forward(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let the model run ``forward``; hooks that replaced it before (accelerate's) come back."""
    before = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before
