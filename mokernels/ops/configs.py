"""Which tile, split and pipeline a GEMM launch uses: a pure function of shape, format and target.

What may vary freely and what may not. Every output element is a sum over K, and fp32 addition is
not associative, so that a bit of the result depends on the *order of addition*. Here it is fixed by
exactly these: the kind of product (which decides the kernel and the matrix instruction), the target
(the same), ``block_k`` (the K step), ``split_k`` (the number of partial sums) and ``promote`` (when
Hopper's accumulator is added to an fp32 one). :attr:`GemmConfig.order` holds the last three. All
rows of a table agree in ``block_k`` and ``promote``, so that for one kind and target only
``split_k`` depends on the shape.

Tuning may vary everything else without changing a bit: ``block_m``, ``block_n``, ``group_m``,
``num_warps``, ``num_stages`` and ``swap`` (which operand is the M side of the instruction). That
holds because no kernel sums over K inside a program other than by the matrix instruction and by
adding its results; a kernel that did (a GEMV, say) would have to fix its warps and tile as well.

``split_k`` is a function of N, K, the bucket of M and the number of processors. N is ``plan_n``,
the N of the fused group, so that a member of a group that is run alone adds as the group does.
Inside :func:`mokernels.batch_invariant` it is that of one row for every M. Many rows then add their
parts of K ``serial``, to the same bits: a workspace of partial sums would grow with M.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from mokernels.formats import FP8_BLOCK
from mokernels.ops.config_tables import (
    ANY_M,
    GemmConfig,
    Kind,
    Rows,
    ceil_div,
    generation,
    rows_of,
    serial_bucket,
)
from mokernels.ops.target import Target

__all__ = [
    "ANY_M",
    "BLOCKS_PER_SPLIT",
    "M_BUCKETS",
    "PARALLEL_ROWS",
    "REDUCE_COLUMNS",
    "SPLITS",
    "GemmConfig",
    "Kind",
    "all_configs",
    "bucket",
    "choose",
    "config_ok",
    "kind_of_fp8",
    "shared_bytes",
]

M_BUCKETS: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
"""Upper ends of the ranges of M that share a choice; beyond the last there is one more."""
SPLITS: tuple[int, ...] = (1, 2, 4, 8)
"""Numbers of partial sums to choose from."""
BLOCKS_PER_SPLIT: int = 4
"""A partial sum takes at least this many K blocks, so that its pipeline gets going."""
REDUCE_COLUMNS: int = 512
"""Columns of the tile of one row that a program of the split-K reduction adds."""

PARALLEL_ROWS: int = 64
"""Most rows whose partial sums are worth programs of their own where their number is given."""


def choose(
    kind: Kind,
    m: int,
    n: int,
    k: int,
    target: Target,
    plan_n: int = 0,
    invariant: bool = False,
) -> GemmConfig:
    """The configuration of a product [m, k] by [n, k].

    Args:
        kind: what is multiplied.
        m: rows of the activations; only its bucket matters.
        n: rows of the weight.
        k: elements that are summed.
        target: the device's kind, and its number of processors.
        plan_n: rows of the fused group that the weight belongs to; 0 if it stands alone.
        invariant: add in the same order for every ``m``, that of one row.
    """
    chosen = _choose_invariant if invariant else _choose
    return chosen(kind, bucket(m), plan_n or n, k, target)


def bucket(m: int) -> int:
    """The upper end of the range of M that ``m`` falls in."""
    return next((end for end in M_BUCKETS if m <= end), ANY_M)


def all_configs(target: Target) -> dict[Kind, tuple[GemmConfig, ...]]:
    """Everything that :func:`choose` can return for a target, before it sets the split."""
    kinds = {kind: tuple(_distinct(rows_of(kind, target))) for kind in Kind}
    return {kind: configs for kind, configs in kinds.items() if configs}


def config_ok(config: GemmConfig, kind: Kind, target: Target) -> bool:
    """Whether a program fits the target, and the configuration the kernel."""
    powers_of_two = all(
        value & (value - 1) == 0 for value in (config.block_m, config.block_n, config.block_k)
    )
    block_scales = kind in (Kind.FP8_BLOCK, Kind.HALF_BLOCK, Kind.FP32)
    one_scale = FP8_BLOCK % config.block_k == 0 and FP8_BLOCK % config.block_n == 0
    promotes = config.promote is None or config.block_k % config.promote == 0
    fits = shared_bytes(config, kind, target) <= target.shared_memory
    return powers_of_two and fits and promotes and (one_scale or not block_scales)


def shared_bytes(config: GemmConfig, kind: Kind, target: Target) -> int:
    """Upper bound of the shared memory of a program, in bytes.

    Pipelined loads keep ``num_stages`` copies of a step's operands as they are stored, one less
    where the matrix instruction is synchronous; a decoded weight may take one more copy in its new
    dtype; the result passes through shared memory in fp32 at the end, when the loads' buffers are
    free again.
    """
    x_item, w_item = _stored_bytes(kind)
    rows = config.block_m * x_item + config.block_n * w_item
    step = int(config.block_k * (rows + _scale_bytes(config, kind)))
    decoded = config.block_n * config.block_k * x_item if kind.value.startswith("half") else 0
    copies = config.num_stages - (generation(target) == "mma")
    end = 4 * config.block_m * config.block_n
    return max(copies * step + int(decoded), end) + 1024


def kind_of_fp8(target: Target, block_scales: bool, fast_accum: bool) -> Kind:
    """The kind of an E4M3 by E4M3 product."""
    if block_scales:
        return Kind.FP8_BLOCK
    return Kind.FP8_FAST if fast_accum and target.promotes_accumulator else Kind.FP8


@cache
def _choose(kind: Kind, m: int, n: int, k: int, target: Target) -> GemmConfig:
    rows = rows_of(kind, target)
    config = next((row for end, row in rows if m <= end), rows[-1][1])
    return replace(config, split_k=_split(config, m, n, k, target))


@cache
def _choose_invariant(kind: Kind, m: int, n: int, k: int, target: Target) -> GemmConfig:
    split_k = _choose(kind, M_BUCKETS[0], n, k, target).split_k
    serial = m > PARALLEL_ROWS and split_k > 1
    if serial:
        m = min(m, serial_bucket(kind, target))
    return replace(_choose(kind, m, n, k, target), split_k=split_k, serial=serial)


def _split(config: GemmConfig, m: int, n: int, k: int, target: Target) -> int:
    """The number of partial sums that fills the processors, for few rows only.

    With few rows a GEMM is a read of the weight, which takes nearly two programs on each processor
    to saturate; with more, the partial sums' own traffic grows with M and one will do.
    """
    if m == ANY_M:
        return 1
    tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    wanted = target.processors * 9 // 5 if m <= 64 else target.processors
    blocks = ceil_div(k, config.block_k)
    chosen = 1
    for split in SPLITS:
        if tiles * chosen >= wanted or blocks < split * BLOCKS_PER_SPLIT:
            break
        chosen = split
    # No partial sum is left without a block: 9 blocks in 8 parts of 2 make 5 parts.
    return ceil_div(blocks, ceil_div(blocks, chosen)) if blocks else 1


def _stored_bytes(kind: Kind) -> tuple[float, float]:
    """Bytes of an element of x and of w in memory (16-bit or fp32 x; the largest w)."""
    if kind is Kind.NVFP4:
        return 0.5, 0.5
    if kind is Kind.FP32:
        return 4, 1
    if kind in (Kind.FP8, Kind.FP8_FAST, Kind.FP8_BLOCK, Kind.MXFP8):
        return 1, 1
    return 2, 0.5 if kind is Kind.HALF_NVFP4 else 1


def _scale_bytes(config: GemmConfig, kind: Kind) -> float:
    """Bytes of pipelined block scales for each element of K in a step."""
    if kind is Kind.NVFP4:
        return (config.block_m + config.block_n) / 16
    if kind is Kind.MXFP8:
        return (config.block_m + config.block_n) / 32
    return config.block_n / {Kind.HALF_NVFP4: 16, Kind.HALF_MXFP8: 32, Kind.FP32: 16}.get(
        kind, ANY_M
    )


def _distinct(rows: Rows) -> Iterator[GemmConfig]:
    seen = set()
    for _, config in rows:
        if config not in seen:
            seen.add(config)
            yield config
