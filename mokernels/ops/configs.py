"""Which tile, split and pipeline a GEMM launch uses: a pure function of shape, format and target.

What may vary freely and what may not. Every output element is a sum over K, and fp32 addition is
not associative, so that a bit of the result depends on the *order of addition*. Here it is fixed by
exactly these: the kind of product (which decides the kernel and the matrix instruction), the target
(the same), ``block_k`` (the K step), ``split_k`` (the number of partial sums) and ``promote`` (when
Hopper's accumulator is added to an fp32 one). :attr:`GemmConfig.order` holds the last three. All
rows of a table below agree in ``block_k`` and ``promote``, so that for one kind and target only
``split_k`` depends on the shape.

Tuning may vary everything else without changing a bit: ``block_m``, ``block_n``, ``group_m``,
``num_warps``, ``num_stages`` and ``swap`` (which operand is the M side of the instruction). That
holds because no kernel sums over K inside a program other than by the matrix instruction and by
adding its results. The GEMV is the exception, its threads' sums being added at the end: it has one
configuration for a target, whatever the shape, and ``block_k`` tells the number of threads.

``split_k`` is a function of N, K, the bucket of M and the number of processors. N is ``plan_n``,
the N of the fused group, so that a member of a group that is run alone adds as the group does.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal

from mokernels.formats import FP8_BLOCK
from mokernels.ops.target import Target

M_BUCKETS: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
"""Upper ends of the ranges of M that share a choice; beyond the last there is one more."""
SPLITS: tuple[int, ...] = (1, 2, 4, 8)
"""Numbers of partial sums to choose from."""
BLOCKS_PER_SPLIT: int = 4
"""A partial sum takes at least this many K blocks, so that its pipeline gets going."""
REDUCE_COLUMNS: int = 512
"""Columns of the tile of one row that a program of the split-K reduction adds."""
GEMVS_PER_PROCESSOR: int = 4
"""Programs of a GEMV, of one or two warps, that a processor needs to have loads enough in flight;
an estimate from the latency of memory."""

Generation = Literal["mma", "wgmma", "tcgen05", "mfma"]


class Kind(enum.Enum):
    """What is multiplied, in which dtype, and when scales enter."""

    FP8 = "fp8"
    """E4M3 by E4M3, scales after the sum."""
    FP8_FAST = "fp8_fast"
    """The same with Hopper's own accumulator for the whole of K."""
    FP8_BLOCK = "fp8_block"
    """E4M3 by E4M3, scales per 128 of K."""
    HALF_FP8 = "half_fp8"
    """16-bit by E4M3, scales after the sum."""
    HALF_BLOCK = "half_block"
    """16-bit by E4M3, scales per 128 of K."""
    HALF_NVFP4 = "half_nvfp4"
    """16-bit by NVFP4, decoded and scaled in registers."""
    HALF_MXFP8 = "half_mxfp8"
    """16-bit by MXFP8, decoded and scaled in registers."""
    GEMV_NVFP4 = "gemv_nvfp4"
    """One row of 16-bit or fp32 numbers by NVFP4, without a matrix instruction."""
    FP32 = "fp32"
    """fp32 by any weight, decoded, with IEEE multiplications."""
    NVFP4 = "nvfp4"
    """NVFP4 by NVFP4 on matrix units that apply block scales."""
    MXFP8 = "mxfp8"
    """MXFP8 by MXFP8 on matrix units that apply block scales."""


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
        split_k: number of partial sums; more than 1 takes a workspace and a second launch.
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

    @property
    def order(self) -> tuple[int, int, int | None]:
        """What fixes the order of addition, for one kind and target; equal orders, equal bits."""
        return self.block_k, self.split_k, self.promote

    def blocks_per_split(self, k: int) -> int:
        """K steps of one partial sum of a product over ``k``."""
        return _ceil_div(_ceil_div(k, self.block_k), self.split_k)


Rows = tuple[tuple[int, GemmConfig], ...]
"""(largest M, configuration), in the order of M; the last one takes every larger M too."""

ANY_M = 1 << 62


def choose(kind: Kind, m: int, n: int, k: int, target: Target, plan_n: int = 0) -> GemmConfig:
    """The configuration of a product [m, k] by [n, k].

    Args:
        kind: what is multiplied.
        m: rows of the activations; only its bucket matters, and a GEMV has one.
        n: rows of the weight.
        k: elements that are summed.
        target: the device's kind, and its number of processors.
        plan_n: rows of the fused group that the weight belongs to; 0 if it stands alone.
    """
    rows = 1 if kind is Kind.GEMV_NVFP4 else bucket(m)
    return _choose(kind, rows, plan_n or n, k, target)


def bucket(m: int) -> int:
    """The upper end of the range of M that ``m`` falls in."""
    return next((end for end in M_BUCKETS if m <= end), ANY_M)


def all_configs(target: Target) -> dict[Kind, tuple[GemmConfig, ...]]:
    """Everything that :func:`choose` can return for a target, before it sets ``split_k``."""
    kinds = {kind: tuple(_distinct(_rows(kind, target))) for kind in Kind}
    return {kind: configs for kind, configs in kinds.items() if configs}


def kind_of_fp8(target: Target, block_scales: bool, fast_accum: bool) -> Kind:
    """The kind of an E4M3 by E4M3 product."""
    if block_scales:
        return Kind.FP8_BLOCK
    return Kind.FP8_FAST if fast_accum and target.promotes_accumulator else Kind.FP8


def generation(target: Target) -> Generation:
    """Which matrix instructions multiply."""
    if target.backend != "cuda":
        return "mfma"
    if not target.wants_swapped_operands:
        return "mma"
    return "wgmma" if target.promotes_accumulator else "tcgen05"


@cache
def _choose(kind: Kind, m: int, n: int, k: int, target: Target) -> GemmConfig:
    rows = _rows(kind, target)
    config = next((row for end, row in rows if m <= end), rows[-1][1])
    return replace(config, split_k=_split(config, m, n, k, target))


def _split(config: GemmConfig, m: int, n: int, k: int, target: Target) -> int:
    """The number of partial sums that fills the processors, for few rows only.

    With few rows a GEMM is a read of the weight, which takes nearly two programs on each processor
    to saturate; with more, the partial sums' own traffic grows with M and one will do. The smaller
    programs of a GEMV have to be more.
    """
    if m == ANY_M:
        return 1
    tiles = _ceil_div(m, config.block_m) * _ceil_div(n, config.block_n)
    wanted = target.processors * 9 // 5 if m <= 64 else target.processors
    if config.block_m == 1:
        wanted = target.processors * GEMVS_PER_PROCESSOR
    blocks = _ceil_div(k, config.block_k)
    chosen = 1
    for split in SPLITS:
        if tiles * chosen >= wanted or blocks < split * BLOCKS_PER_SPLIT:
            break
        chosen = split
    # No partial sum is left without a block: 9 blocks in 8 parts of 2 make 5 parts.
    return _ceil_div(blocks, _ceil_div(blocks, chosen)) if blocks else 1


def _rows(kind: Kind, target: Target) -> Rows:
    if kind in (Kind.NVFP4, Kind.MXFP8) and not target.has_block_scaled_dot:
        return ()
    if kind is Kind.FP8_FAST and not target.promotes_accumulator:
        return ()
    if kind is Kind.FP32:
        return _FP32
    if kind is Kind.GEMV_NVFP4:
        return _GEMV if target.backend == "cuda" else _GEMV_OF_64_THREADS
    table = _TABLES[generation(target)]
    if kind in (Kind.FP8, Kind.FP8_BLOCK) and not target.has_fp8_dot:
        return _BITS
    return table[kind]


def _distinct(rows: Rows) -> Iterator[GemmConfig]:
    seen = set()
    for _, config in rows:
        if config not in seen:
            seen.add(config)
            yield config


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _row(
    end: int, m: int, n: int, k: int, warps: int, stages: int, swap: bool = False
) -> tuple[int, GemmConfig]:
    return end, GemmConfig(m, n, k, warps, stages, swap)


def _promoted(rows: Rows) -> Rows:
    """The same rows with Hopper's accumulator promoted every 128 products."""
    return tuple((end, replace(config, promote=FP8_BLOCK)) for end, config in rows)


# Chosen by compiling: no spills, 128-bit loads, the widest matrix instruction, on triton 3.6 and
# 3.9. Register pressure is what limits tiles: block scales take twice the accumulators.
_FP32: Rows = (_row(16, 16, 32, 32, 4, 3), _row(ANY_M, 32, 32, 32, 8, 2))

# Small programs of few warps: the fastest tile of a prototype on an H100 for 28672 x 4096, with two
# partial sums there, whose reduction was not counted.
_GEMV: Rows = (_row(ANY_M, 1, 4, 2048, 2, 1),)
_GEMV_OF_64_THREADS: Rows = (_row(ANY_M, 1, 4, 2048, 1, 1),)

# E4M3 decoded by bits to fp16, both operands: targets without an FP8 matrix instruction.
_BITS: Rows = (
    _row(16, 16, 64, 128, 4, 3),
    _row(32, 32, 64, 128, 4, 4),
    _row(ANY_M, 64, 128, 128, 8, 2),
)

_MMA_HALF: Rows = (
    _row(16, 16, 64, 64, 4, 4),
    _row(32, 32, 64, 64, 4, 4),
    _row(64, 64, 64, 64, 4, 3),
    _row(ANY_M, 128, 128, 64, 8, 3),
)
_MMA_NVFP4: Rows = (
    _row(16, 16, 64, 256, 4, 3),
    _row(32, 32, 64, 256, 4, 3),
    _row(64, 64, 64, 256, 4, 3),
    _row(ANY_M, 128, 128, 256, 8, 3),
)
_MMA_MXFP8: Rows = (
    _row(16, 16, 64, 128, 4, 3),
    _row(32, 32, 64, 128, 4, 3),
    _row(64, 64, 64, 128, 4, 3),
    _row(ANY_M, 128, 128, 128, 8, 3),
)
_MMA: Mapping[Kind, Rows] = MappingProxyType(
    {
        Kind.FP8: (
            _row(16, 16, 64, 128, 4, 4),
            _row(32, 32, 64, 128, 4, 4),
            _row(64, 64, 128, 128, 4, 3),
            _row(ANY_M, 128, 128, 128, 8, 3),
        ),
        Kind.FP8_BLOCK: (
            _row(16, 16, 64, 128, 4, 4),
            _row(32, 32, 64, 128, 4, 4),
            _row(ANY_M, 64, 128, 128, 8, 3),
        ),
        Kind.HALF_FP8: _MMA_HALF,
        Kind.HALF_BLOCK: _MMA_HALF,
        Kind.HALF_NVFP4: _MMA_HALF,
        Kind.HALF_MXFP8: _MMA_HALF,
        Kind.NVFP4: _MMA_NVFP4,
        Kind.MXFP8: _MMA_MXFP8,
    }
)

# Few rows of x are the N side of a wgmma, whose M side is 64 rows of the weight for every 4 warps.
_WGMMA_FP8: Rows = (
    _row(16, 16, 64, 128, 4, 6, swap=True),
    _row(32, 32, 128, 128, 4, 5, swap=True),
    _row(64, 64, 128, 128, 4, 4, swap=True),
    _row(512, 128, 128, 128, 8, 4),
)
# A decoded weight goes from registers into the instruction if it is the M side.
_WGMMA_HALF: Rows = (
    _row(16, 16, 64, 128, 4, 4, swap=True),
    _row(32, 32, 64, 128, 4, 4, swap=True),
    _row(64, 64, 128, 128, 8, 3, swap=True),
    _row(ANY_M, 128, 128, 128, 8, 3, swap=True),
)
_WGMMA: Mapping[Kind, Rows] = MappingProxyType(
    {
        Kind.FP8: _promoted(_WGMMA_FP8),
        # With promotion a 128x256 tile spills.
        Kind.FP8_FAST: (*_WGMMA_FP8, _row(ANY_M, 128, 256, 128, 8, 3)),
        Kind.FP8_BLOCK: (
            _row(16, 16, 64, 128, 4, 6, swap=True),
            _row(32, 32, 128, 128, 4, 4, swap=True),
            _row(64, 64, 128, 128, 8, 4, swap=True),
            _row(ANY_M, 128, 128, 128, 8, 4),
        ),
        Kind.HALF_FP8: _WGMMA_HALF,
        Kind.HALF_BLOCK: (*_WGMMA_HALF[:3], _row(ANY_M, 128, 128, 128, 8, 3)),
        Kind.HALF_NVFP4: _WGMMA_HALF,
        Kind.HALF_MXFP8: _WGMMA_HALF,
    }
)

_TCGEN05_FEW: Rows = (
    _row(16, 16, 128, 128, 4, 4, swap=True),
    _row(32, 32, 128, 128, 4, 4, swap=True),
    _row(64, 64, 128, 128, 8, 4, swap=True),
)
_TCGEN05_HALF: Rows = (
    _row(16, 16, 128, 128, 4, 4, swap=True),
    _row(32, 32, 128, 128, 4, 3, swap=True),
    _row(64, 64, 128, 128, 8, 3, swap=True),
    _row(ANY_M, 128, 128, 128, 8, 3),
)
_TCGEN05: Mapping[Kind, Rows] = MappingProxyType(
    {
        Kind.FP8: (*_TCGEN05_FEW, _row(ANY_M, 128, 128, 128, 8, 4)),
        Kind.FP8_BLOCK: (*_TCGEN05_FEW, _row(ANY_M, 128, 128, 128, 8, 4)),
        Kind.HALF_FP8: _TCGEN05_HALF,
        Kind.HALF_BLOCK: _TCGEN05_HALF,
        Kind.HALF_NVFP4: _TCGEN05_HALF,
        Kind.HALF_MXFP8: _TCGEN05_HALF,
        Kind.NVFP4: (
            _row(32, 32, 128, 256, 4, 3, swap=True),
            _row(64, 64, 128, 256, 8, 3, swap=True),
            _row(ANY_M, 128, 128, 256, 8, 3),
        ),
        Kind.MXFP8: (*_TCGEN05_FEW, _row(ANY_M, 128, 128, 128, 8, 3)),
    }
)

_MFMA_HALF: Rows = (
    _row(16, 16, 64, 64, 4, 2),
    _row(32, 32, 64, 64, 4, 2),
    _row(ANY_M, 64, 64, 64, 4, 2),
)
_MFMA: Mapping[Kind, Rows] = MappingProxyType(
    {
        Kind.FP8: _MFMA_HALF,
        Kind.FP8_BLOCK: _MFMA_HALF,
        Kind.HALF_FP8: _MFMA_HALF,
        Kind.HALF_BLOCK: _MFMA_HALF,
        Kind.HALF_NVFP4: _MFMA_HALF,
        Kind.HALF_MXFP8: _MFMA_HALF,
    }
)

_TABLES: Mapping[Generation, Mapping[Kind, Rows]] = MappingProxyType(
    {"mma": _MMA, "wgmma": _WGMMA, "tcgen05": _TCGEN05, "mfma": _MFMA}
)
