"""A kernel launch as data: planned by a pure function, then run, or only compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import mokernels.ops.launch.replay as replay
from mokernels.ops.launch.direct import launch
from mokernels.ops.target import has_dependent_launch

Outputs = TypeVar("Outputs", Tensor, tuple[Tensor, ...])


@dataclass(frozen=True)
class Launch:
    """One launch of one Triton kernel.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: number of programs along three axes.
        args: run-time arguments in the kernel's order (tensors, descriptors of tensors, ints); the
            tensors may be meta.
        constants: compile-time arguments by name.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        fp_fusion: whether the compiler may contract a product and a sum to one multiply-add, which
            rounds once less. Which pairs it finds differs from one build of a kernel to the next.
    """

    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    fp_fusion: bool = True

    def run(self, dependent: bool = False) -> None:
        """Launch on the current device and stream.

        Args:
            dependent: begin while the kernel before it still runs; see kernels/dependents.py.
        """
        if 0 in self.grid:
            return
        options = self._how(dependent)
        launch(self.kernel, self.grid, self.args, self.constants, options)
        replay.launched(self, options)

    def compile(self, dependent: bool = False) -> None:
        """Compile for the current device what :meth:`run` would launch, if it is not there yet."""
        self.kernel.warmup(*self.args, grid=self.grid, **self.options(dependent))

    def options(self, dependent: bool = False) -> dict[str, Any]:
        """What the kernel is given by name: its constants, and how to compile and launch it."""
        return {**self.constants, **self._how(dependent)}

    def _how(self, dependent: bool) -> dict[str, Any]:
        chosen = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fp_fusion,
        }
        return {**chosen, "launch_pdl": True} if dependent else chosen

    @property
    def variant(self) -> tuple[Any, ...]:
        """Equal for launches that one compiled kernel serves; hashable."""
        constants = tuple(sorted((name, str(value)) for name, value in self.constants.items()))
        given = tuple(_specialized(argument) for argument in self.args)
        return self.kernel, constants, given, self.num_warps, self.num_stages, self.fp_fusion


def run(planned: tuple[Outputs, tuple[Launch, ...]]) -> Outputs:
    """Run the launches in order, on the device of the result, and return the result.

    Each begins while the one before it ends, where the device can do that. The first begins when
    all before the operator has ended: on an H200 that was faster for single launches, and the other
    way for a product after its quantizer (bench/results).
    """
    outputs, launches = planned
    device = (outputs if isinstance(outputs, Tensor) else outputs[0]).device
    dependent, index = has_dependent_launch(device), device.index
    if index is None or index == torch.accelerator.current_device_index():
        _run_all(launches, dependent)
    else:
        with torch.accelerator.device_index(index):
            _run_all(launches, dependent)
    return outputs


def _run_all(launches: tuple[Launch, ...], dependent: bool) -> None:
    for number, planned in enumerate(launches):
        planned.run(dependent and number > 0)


def _specialized(argument: Any) -> Any:
    """What Triton may compile an argument in for."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0
    return getattr(argument, "dtype", None)
