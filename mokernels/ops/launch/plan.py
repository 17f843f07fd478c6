"""A kernel launch as data: planned by a pure function, then run, or only compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mokernels.ops.launch.direct import launch


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
        launch(self.kernel, self.grid, self.args, self.constants, self._how(dependent))

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


def _specialized(argument: Any) -> Any:
    """What Triton may compile an argument in for."""
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0
    return getattr(argument, "dtype", None)
