"""The configuration of a GEMM launch: what one is, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mokernels.ops.kinds import Kind

Split = Literal["last", "parts", "serial"] | None
"""Who adds the parts of K: the program of a tile that is the last to store its part, a second
launch, the one program that makes them all; None if there is only one part."""
LAST_PROGRAM_BYTES = 128 * 1024
"""Most bytes of partial sums that the last program of a tile adds.

They come from the L2 cache to one processor, at 40 to 60 bytes a ns on an H100, an estimate from
what all of its processors together reach. That is the 2 to 3 us that a second launch takes, in
which all processors share the work.
"""
LAST_PROGRAM_SUMS = 32
"""Most sums of a tile for each thread of its last program: with 64 registers spill on sm_89."""


@dataclass(frozen=True)
class GemmConfig:
    """How one GEMM is launched.

    Attributes:
        block_m: rows of x in a program's tile.
        block_n: rows of the weight in a program's tile.
        block_k: elements of K in one step.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline, in K steps.
        swap: the weight is the M side of the matrix instruction.
        promote: FP8 products after which Hopper's accumulator is added to an fp32 one; None never.
        group_m: row tiles that neighbouring programs walk before the next column.
        split_k: number of partial sums; more than 1 takes a workspace, or ``serial``.
        serial: a program computes all partial sums of its tile, one after the other.
        tma: operands come by TMA, and programs stay for several tiles; the closed form never splits
            K then.
        one_launch: the last program of a tile may add the partial sums.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    promote: int | None = None
    group_m: int = 8
    split_k: int = 1
    serial: bool = False
    tma: bool = False
    one_launch: bool = True

    @property
    def order(self) -> tuple[int, int, int | None]:
        """What fixes the order of addition, for one kind and target; equal orders, equal bits."""
        return self.block_k, self.split_k, self.promote

    @cached_property
    def split(self) -> Split:
        """What the kernels do about the partial sums."""
        if self.split_k == 1 or self.serial:
            return "serial" if self.split_k > 1 else None
        sums = self.block_m * self.block_n
        few_of_a_thread = sums <= LAST_PROGRAM_SUMS * 32 * self.num_warps
        few = few_of_a_thread and 4 * self.split_k * sums <= LAST_PROGRAM_BYTES
        return "last" if self.one_launch and few else "parts"

    def blocks_per_split(self, k: int) -> int:
        """K steps of one partial sum of a product over ``k``."""
        return ceil_div(ceil_div(k, self.block_k), self.split_k)


DECODED_FIRST = (Kind.HALF_NVFP4, Kind.HALF_MXFP8)
"""Kinds whose weight a launch of its own decodes to x's dtype where the product goes by TMA."""


def decodes_first(config: GemmConfig, kind: Kind) -> bool:
    """Whether the product reads a weight that was decoded before, and not codes and scales."""
    return config.tma and kind in DECODED_FIRST


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up."""
    return -(-a // b)
