"""Stand-ins for CUDA graphs on the CPU: what a step does once, done again from fixed buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS_A_VALUE = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class _Recorder(TorchDispatchMode):
    """Keeps every operator with the very tensors that it was given and that it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A CUDA graph cannot wait for a value either.
        assert func not in READS_A_VALUE, f"{func} makes the host wait for the device"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do to memory what was done: no Python of the model runs."""
        for func, args, kwargs, result in self.calls:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            places = {t.untyped_storage().data_ptr() for t in given}
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(result), again, strict=True):
                if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in places:
                    old.copy_(new)


class Recorded:
    """Replays operators one by one; layers must not be compiled, whose kernels are not seen.

    Attributes:
        count: calls that were recorded.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], Any], rewind: Callable[[], None]):
        run()
        rewind()
        with _Recorder() as recorder:
            result = run()
        rewind()
        for leaf in tree_leaves(dict(result)):
            # What a graph returns holds nothing before the first replay.
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf.fill_(float("nan"))
        self.count += 1
        return recorder.replay, result


class Rerun:
    """Replays by running the call itself, compiled layers and all, on its buffers.

    Attributes:
        count: calls that were recorded.
    """

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], Any], rewind: Callable[[], None]):
        result = run()
        rewind()
        self.count += 1

        def replay() -> None:
            result.logits.copy_(run().logits)

        return replay, result
