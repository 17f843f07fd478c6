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
adding its results. GEMVs are the exception, their threads' sums being added at the end: each has
one configuration for a target, whatever the shape, and ``block_k`` tells the number of threads. Who
adds the partial sums, the last program of a tile or a second launch (:attr:`GemmConfig.split`),
changes no bit either.

``split_k`` is a function of N, K, the bucket of M and the number of processors. N is ``plan_n``,
the N of the fused group, so that a member of a group that is run alone adds as the group does.
Few rows by an NVFP4 weight are multiplied by another instruction than many on Hopper, in an order
of K that suits it. Inside :func:`mokernels.batch_invariant` they are not, and ``split_k`` is that
of one row for every M. Many rows then add their parts of K ``serial``, to the same bits: a
workspace of partial sums would grow with M.

Many rows of codes by codes are multiplied by TMA, if K is not split. Whether TMA can read the
operands depends on addresses and strides, which may not change a bit: :func:`choose_without_tma`
returns what takes its place, with the same order.

Many rows by an NVFP4 or MXFP8 weight that the target's matrix units cannot scale go by TMA too,
once the weight is decoded (``decodes_first``), if there are tiles enough for half of the
processors. K is never split there, and its step is another one: the order is not that of fewer
rows, even where the bits may be. So batch-invariant launches, which have one order for every M,
decode the weight in the product. Activations that TMA cannot read are copied, which changes no bit.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product

from mokernels.ops.config_tables import ANY_M, generation, rows_of, serial_bucket
from mokernels.ops.gemm_config import DECODED_FIRST, GemmConfig, ceil_div, decodes_first
from mokernels.ops.kinds import GEMVS, Kind
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
    "choose_without_tma",
    "kind_of_fp8",
]

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
DECODERS_PER_PROCESSOR: float = 3.5
"""Programs of up to 16 rows that a Hopper processor needs where they decode their weight, measured
on an H200: they wait for their own instructions, which more programs hide."""
FEW_ROWS_PER_PROCESSOR: float = 1.6
"""The same for other products of up to 64 rows, which only wait for the weight."""
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
        m: rows of the activations; only its bucket matters, and a GEMV has one.
        n: rows of the weight.
        k: elements that are summed.
        target: the device's kind, and its number of processors.
        plan_n: rows of the fused group that the weight belongs to; 0 if it stands alone.
        invariant: add in the same order for every ``m``, that of one row.
    """
    chosen = _choose_invariant if invariant else _choose
    rows = 1 if kind in GEMVS else bucket(m)
    return chosen(kind, rows, plan_n or n, k, target)


def choose_without_tma(
    kind: Kind,
    m: int,
    n: int,
    k: int,
    target: Target,
    plan_n: int = 0,
    invariant: bool = False,
) -> GemmConfig:
    """As :func:`choose`, in the same order of addition, for operands that TMA cannot read.

    The order is another one only where the weight would be decoded first.
    """
    chosen = _choose_invariant if invariant else _choose
    return chosen(kind, bucket(m), plan_n or n, k, target, False)


def bucket(m: int) -> int:
    """The upper end of the range of M that ``m`` falls in."""
    place = bisect_left(M_BUCKETS, m)
    return M_BUCKETS[place] if place < len(M_BUCKETS) else ANY_M


def all_configs(target: Target) -> dict[Kind, tuple[GemmConfig, ...]]:
    """Everything that :func:`choose` can return for a target, before it sets the split."""
    kinds = {
        kind: tuple(
            _distinct(
                row
                for tma, invariant in product((True, False), (False, True))
                for row in rows_of(kind, target, tma, invariant)
            )
        )
        for kind in Kind
    }
    return {kind: configs for kind, configs in kinds.items() if configs}


def kind_of_fp8(target: Target, block_scales: bool, fast_accum: bool) -> Kind:
    """The kind of an E4M3 by E4M3 product."""
    if block_scales:
        return Kind.FP8_BLOCK
    return Kind.FP8_FAST if fast_accum and target.promotes_accumulator else Kind.FP8


@cache
def _choose(
    kind: Kind,
    m: int,
    n: int,
    k: int,
    target: Target,
    tma: bool = True,
    invariant: bool = False,
) -> GemmConfig:
    rows = rows_of(kind, target, tma, invariant)
    config = next((row for end, row in rows if m <= end), rows[-1][1])
    if decodes_first(config, kind):
        return (
            config
            if _fills_half(m, n, target)
            else _choose(kind, m, n, k, target, False, invariant)
        )
    split_k = _split(config, kind, m, n, k, target)
    if config.tma and split_k > 1:
        return _choose(kind, m, n, k, target, False, invariant)
    return replace(config, split_k=split_k)


@cache
def _choose_invariant(
    kind: Kind, m: int, n: int, k: int, target: Target, tma: bool = True
) -> GemmConfig:
    split_k = _choose(kind, M_BUCKETS[0], n, k, target, invariant=True).split_k
    serial = m > PARALLEL_ROWS and split_k > 1
    if serial:
        m = min(m, serial_bucket(kind, target))
    tma = tma and split_k == 1 and kind not in DECODED_FIRST
    config = _choose(kind, m, n, k, target, tma, True)
    return replace(config, split_k=split_k, serial=serial)


def _split(config: GemmConfig, kind: Kind, m: int, n: int, k: int, target: Target) -> int:
    """The number of partial sums that fills the processors, for few rows only.

    With few rows a GEMM is a read of the weight, which takes more than one program on each
    processor to saturate; with more, the partial sums' own traffic grows with M. Written and read
    in fp32 it may be half of an FP8 weight's, which has one byte for each of N K elements.
    """
    if m == ANY_M:
        return 1
    tiles = ceil_div(m, config.block_m) * ceil_div(n, config.block_n)
    wanted = target.processors * _programs_per_processor(kind, m, target)
    blocks = ceil_div(k, config.block_k)
    chosen = 1
    for split in SPLITS:
        too_short = blocks < split * BLOCKS_PER_SPLIT
        too_much = split > 1 and 2 * 2 * 4 * m * split > k
        if tiles * chosen >= wanted or too_short or too_much:
            break
        chosen = split
    # No partial sum is left without a block: 9 blocks in 8 parts of 2 make 5 parts.
    return ceil_div(blocks, ceil_div(blocks, chosen)) if blocks else 1


def _programs_per_processor(kind: Kind, m: int, target: Target) -> float:
    if kind in GEMVS:
        return GEMVS_PER_PROCESSOR
    decodes = kind in (Kind.HALF_FP8, Kind.HALF_BLOCK, Kind.HALF_NVFP4, Kind.HALF_MXFP8)
    if decodes and m <= M_BUCKETS[0] and generation(target) == "wgmma":
        return DECODERS_PER_PROCESSOR
    return FEW_ROWS_PER_PROCESSOR if m <= 64 else 1.0


def _fills_half(m: int, n: int, target: Target) -> bool:
    """Whether tiles of 128x128 are enough for half of the processors, each over the whole of K.

    With fewer, a weight that is decoded first is slower than one of which programs share K.
    """
    return 2 * ceil_div(m, 128) * ceil_div(n, 128) >= target.processors


def _distinct(rows: Iterable[tuple[int, GemmConfig]]) -> Iterator[GemmConfig]:
    seen = set()
    for _, config in rows:
        if config not in seen:
            seen.add(config)
            yield config
