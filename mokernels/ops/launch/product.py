"""From operands and a configuration to launches: what all GEMM launchers share.

Every GEMM kernel takes its arguments in this order: the operands' pointers; then the ending's
(``scale_x``, ``scale_w``, ``bias``, ``out``); M, N, K; the operands' strides; the ending's strides;
the K steps of a partial sum. Where programs share K, kernels/reduce.py says what ``out`` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mokernels.ops.configs import REDUCE_COLUMNS, GemmConfig
from mokernels.ops.gemm_config import ceil_div
from mokernels.ops.kernels.reduce import reduce_splits
from mokernels.ops.launch.counters import counters_for
from mokernels.ops.launch.plan import Launch
from mokernels.ops.launch.replay import remade
from mokernels.ops.target import Target

Planned = tuple[Tensor, tuple[Launch, ...]]
"""A result that is not filled yet, and the launches that fill it, in order."""


@dataclass(frozen=True)
class Operands:
    """What a kernel reads in its main loop.

    Attributes:
        pointers: x, w and the scales that enter along K, in the kernel's order; None if absent.
        strides: of these, in the kernel's order.
        sizes: M, N and K, in elements.
    """

    pointers: tuple[Tensor | None, ...]
    strides: tuple[int, ...]
    sizes: tuple[int, int, int]


@dataclass(frozen=True)
class Ending:
    """What happens to a finished sum: times scale_x [M], times scale_w [N], plus bias [N], cast.

    Attributes:
        out: contiguous [..., N], of any float dtype.
        bias: [N] of any float dtype, or None.
        scale_x: fp32 of any shape with 1 or M items, or None.
        scale_w: fp32 of any shape with 1 or N items, or None.
    """

    out: Tensor
    bias: Tensor | None = None
    scale_x: Tensor | None = None
    scale_w: Tensor | None = None

    @property
    def pointers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
        """In the kernels' order; vectors are read by their stride, the bias has to be dense."""
        bias = None if self.bias is None else self.bias.contiguous()
        return _vector(self.scale_x), _vector(self.scale_w), bias, self.out

    @property
    def strides(self) -> tuple[int, int]:
        """Of scale_x and scale_w; 0 repeats one item."""
        return _step(_vector(self.scale_x)), _step(_vector(self.scale_w))


def plan_product(
    kernel: Any, operands: Operands, ending: Ending, config: GemmConfig, **constants: Any
) -> tuple[Launch, ...]:
    """The launches of one product: one, or two where a second one adds the parts of K.

    Args:
        kernel: one of the GEMM kernels.
        operands: its operands.
        ending: what to do with the sums, and where to put them.
        config: tile, split and pipeline.
        **constants: compile-time arguments that only this kernel has.
    """
    m, n, k = operands.sizes
    split = plan_split(ending, config, m, n)
    steps = config.blocks_per_split(k)
    product = Launch(
        kernel,
        (split.tiles, split.parts, 1),
        (*operands.pointers, *split.pointers, m, n, k, *operands.strides, *split.strides, steps),
        {
            **constants,
            "EVEN_K": k % config.block_k == 0,
            "SPLIT": config.split,
            **_tile(config),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return (product, *split.reduction)


class SplitEnding(NamedTuple):
    """What a product that may share K among programs is launched with.

    Attributes:
        tiles: of the result.
        parts: programs of a tile.
        pointers: scale_x, scale_w, bias and out, as the kernels take them (:func:`finish`).
        strides: of scale_x and scale_w.
        reduction: the launch that adds the parts; none where the product's own programs do.
    """

    tiles: int
    parts: int
    pointers: tuple[Any, ...]
    strides: tuple[int, int]
    reduction: tuple[Launch, ...]


def plan_split(ending: Ending, config: GemmConfig, m: int, n: int) -> SplitEnding:
    """The ending of a product [m, n], with a workspace and counters where its K is split."""
    parts = config.split_k if config.split in ("last", "parts") else 1
    partials = ending.out.new_empty((parts, m, n), dtype=torch.float32) if parts > 1 else None
    tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    reduction: tuple[Launch, ...] = ()
    if config.split == "parts" and partials is not None:
        reduction = (_plan_reduction(partials, ending),)
    return SplitEnding(tiles, parts, *_ending(ending, config, partials, tiles), reduction)


def rows_of(x: Tensor) -> Tensor:
    """A tensor [..., K] as [M, K]: a view if K is dense and the strides allow it, else a copy."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def dense_columns(w: Tensor) -> Tensor:
    """A matrix with its last dimension dense: the checkpoint's own, or else a copy."""
    return w if w.stride(-1) == 1 else w.contiguous()


def row_stride(scale: Tensor | None) -> int:
    """Of block scales [rows, blocks]; 0 for none."""
    return 0 if scale is None else scale.stride(0)


def codes_of(codes: Tensor, target: Target) -> Tensor:
    """E4M3 codes (or scales) as a kernel for ``target`` reads them: bytes if it lacks the type."""
    return codes if target.has_fp8_type else codes.view(torch.uint8)


def _tile(config: GemmConfig) -> dict[str, int | bool]:
    """A program's tile; that of a GEMV has one row: no sides to swap, no rows to walk down."""
    tile = {"BLOCK_N": config.block_n, "BLOCK_K": config.block_k}
    if config.block_m == 1:
        return tile
    return {
        **tile,
        "SWAP": config.swap,
        "BLOCK_M": config.block_m,
        "GROUP_M": config.group_m,
    }


def _ending(
    ending: Ending, config: GemmConfig, partials: Tensor | None, tiles: int
) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """The ending's pointers and strides, as the product takes them."""
    if config.split == "parts":
        return (None, None, None, partials), (0, 0)
    *given, out = ending.pointers
    if config.split == "last":
        out = (out, partials, remade(counters_for, out.device, tiles))
    return (*given, out), ending.strides


def _plan_reduction(partials: Tensor, ending: Ending) -> Launch:
    parts, m, n = partials.shape
    constants = {"BLOCK_M": 1, "BLOCK_N": REDUCE_COLUMNS}
    arguments = (partials, *ending.pointers, m, n, *ending.strides, parts)
    grid = (m, ceil_div(n, REDUCE_COLUMNS), 1)
    return Launch(reduce_splits, grid, arguments, constants, num_warps=4, num_stages=1)


def _vector(scale: Tensor | None) -> Tensor | None:
    # A scalar is a vector of one item to a kernel: a view of it would cost a microsecond.
    return scale if scale is None or scale.dim() < 2 else scale.reshape(-1)


def _step(vector: Tensor | None) -> int:
    return 0 if vector is None or vector.numel() == 1 else vector.stride(0)
