"""One call captured and replayed: what changes between calls goes through fixed buffers.

A CUDA graph replays kernels with the addresses that they were captured with. So every tensor that a
call is given is copied into a buffer that stays, whatever is not a tensor must be the same in each
call (it is part of the key under which the capture is kept), and state that the call changes by
itself, such as a cache, is the caller's business (``rewind``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mokernels.errors import ArgumentError, BackendError

_WARMUPS = 2
_LIMIT = 32
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


class Capture(Protocol):
    """Records what a call does to memory, to do it again; :class:`CudaGraphs` is one."""

    def __call__(
        self, run: Callable[[], Any], rewind: Callable[[], None]
    ) -> tuple[Callable[[], None], Any]:
        """Record ``run``.

        Args:
            run: takes its inputs from fixed places; may be run several times.
            rewind: brings the state that ``run`` changes back to where it was before; it is as
                before too when this returns.

        Returns:
            A function that does it again, and the result of ``run``: the same tensors each time,
            which hold what they should once the function has been called.
        """


class CudaGraphs:
    """Captures calls as CUDA graphs with one pool of memory.

    Args:
        device: where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def __call__(
        self, run: Callable[[], Any], rewind: Callable[[], None]
    ) -> tuple[Callable[[], None], Any]:
        """Record ``run``; compilation and first launches happen before, on the same stream.

        Raises:
            BackendError: ``run`` waits for the device, or does something else that no graph holds.
        """
        with torch.cuda.device(self._device):
            stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                for _ in range(_WARMUPS):
                    run()
                    rewind()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            try:
                result = self._captured(graph, stream, run)
            except RuntimeError as error:
                raise BackendError(
                    "A decoding step could not be captured as a CUDA graph: wanted work for the "
                    f"device alone, found {error}. Pass cuda_graphs=False."
                ) from error
            # Capturing moved Python's counts, and no tensor.
            rewind()
        return graph.replay, result

    def _captured(self, graph: Any, stream: Any, run: Callable[[], Any]) -> Any:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Other threads (a streamer's reader) may use the device meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, self._pool, stream, capture_error_mode=mode):
            return run()


@dataclass(frozen=True)
class _Captured:
    replay: Callable[[], None]
    buffers: tuple[Tensor, ...]
    result: Any


class Steps:
    """Captured calls, by what they were given.

    Args:
        capture: how a call is recorded.
    """

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._captured: dict[Hashable, _Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def __call__(
        self,
        call: Callable[..., Any],
        kwargs: Mapping[str, Any],
        state: Hashable,
        rewinder: Callable[[], Callable[[], None]],
    ) -> Any:
        """What ``call(**kwargs)`` returns, by replaying it.

        Args:
            call: called with buffers in place of the tensors, the first time only.
            kwargs: nested containers of tensors, numbers, strings and None.
            state: what else the recorded work depends on.
            rewinder: called before the call is recorded; returns the rewind of :class:`Capture`.

        Returns:
            The call's result, whose tensors the next call overwrites.

        Raises:
            ArgumentError: something else than a tensor changes from call to call, or cannot be
                compared.
        """
        leaves, spec = pytree.tree_flatten(dict(kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = (state, spec, tuple(map(_kind, leaves)))
        if key not in self._captured:
            self._check_room()
            self._captured[key] = self._record(call, leaves, spec, rewinder())
        captured = self._captured[key]
        for buffer, tensor in zip(captured.buffers, tensors, strict=True):
            buffer.copy_(tensor)
        captured.replay()
        return captured.result

    def _record(
        self, call: Callable[..., Any], leaves: list[Any], spec: Any, rewind: Callable[[], None]
    ) -> _Captured:
        fixed = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        given = pytree.tree_unflatten(fixed, spec)
        replay, result = self._capture(lambda: call(**given), rewind)
        return _Captured(replay, tuple(b for b in fixed if isinstance(b, Tensor)), result)

    def _check_room(self) -> None:
        if len(self._captured) >= _LIMIT:
            raise ArgumentError(
                f"{_LIMIT} CUDA graphs were captured of one model's decoding step, wanted one or a "
                "few: an input changes in shape, or a number among them in value, from step to "
                "step. Pass cuda_graphs=False."
            )


def _kind(leaf: Any) -> Hashable:
    """All of a leaf that a captured call depends on, the contents of tensors aside."""
    if isinstance(leaf, Tensor):
        return (leaf.shape, leaf.dtype, leaf.device, leaf.stride())
    if isinstance(leaf, _CONSTANTS):
        return (type(leaf), leaf)
    raise ArgumentError(
        f"A decoding step with CUDA graphs was given a {type(leaf).__name__}, wanted tensors, "
        "numbers, strings and None. Pass cuda_graphs=False."
    )
