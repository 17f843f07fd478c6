"""The configurations of GEMM launches: a table for each kind of product and generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from mokernels.formats import FP8_BLOCK
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.kinds import GEMVS, Kind
from mokernels.ops.target import Target

Generation = Literal["mma", "wgmma", "tcgen05", "mfma"]
Table = Literal[Generation, "mma_scaled", "fnuz", "bits"]


Rows = tuple[tuple[int, GemmConfig], ...]
"""(largest M, configuration), in the order of M; the last one takes every larger M too."""

ANY_M = 1 << 62


def generation(target: Target) -> Generation:
    """Which kind of matrix instruction the target has."""
    if target.backend != "cuda":
        return "mfma"
    if not target.wants_swapped_operands:
        return "mma"
    return "wgmma" if target.promotes_accumulator else "tcgen05"


def rows_of(kind: Kind, target: Target, tma: bool = True, invariant: bool = False) -> Rows:
    """The configurations of a kind on a target by the bucket of M; none where it does not exist.

    ``tma`` is False for operands that TMA cannot read; ``invariant`` leaves out what adds otherwise
    than the other rows do.
    """
    rows = _rows_of(kind, target, tma, invariant)
    if target.backend == "cuda":
        return rows
    # On AMD a barrier does not wait for other waves' stores to reach the L2 cache, and one wave's
    # release, after it, does not either (read in the assembly of gfx942): the last program might
    # read what is not there yet. Of Intel's devices nothing is known.
    return tuple((end, replace(config, one_launch=False)) for end, config in rows)


def _rows_of(kind: Kind, target: Target, tma: bool, invariant: bool) -> Rows:
    lacks_nvfp4 = kind is Kind.NVFP4 and not target.has_nvfp4_dot
    lacks_mxfp8 = kind is Kind.MXFP8 and not target.has_mxfp8_dot
    if lacks_nvfp4 or lacks_mxfp8 or (kind is Kind.FP8_FAST and not target.promotes_accumulator):
        return ()
    if kind is Kind.FP32:
        return _FP32
    if kind in GEMVS:
        gemv = _GEMV if kind is Kind.GEMV_NVFP4 else _GEMV_E4M3
        return gemv if target.backend == "cuda" else _of_64_threads(gemv)
    table = _table(kind, target)
    rows = _TABLES[table][kind]
    by_tma = _BY_TMA.get((table, kind), ()) if tma else ()
    by_warps = () if invariant else _BY_WARPS.get((table, kind), ())
    rows = by_warps + rows[len(by_warps) :]
    return _up_to(by_tma[0][0] // 2, rows) + by_tma if by_tma else rows


def _up_to(last: int, rows: Rows) -> Rows:
    """The rows of a table for the buckets up to this one."""
    few = tuple(row for row in rows if row[0] < last)
    return *few, (last, rows[len(few)][1])


def serial_bucket(kind: Kind, target: Target) -> int:
    """Largest bucket of M whose tile leaves registers for a second accumulator."""
    return _SERIAL_BUCKETS.get((_table(kind, target), kind), ANY_M)


def _table(kind: Kind, target: Target) -> Table:
    if kind in (Kind.FP8, Kind.FP8_BLOCK) and not target.has_fp8_dot:
        return "bits"
    if kind in (Kind.FP8, Kind.FP8_BLOCK) and target.has_fnuz_dot:
        return "fnuz"
    found = generation(target)
    return "mma_scaled" if found == "mma" and target.has_nvfp4_dot else found


def _row(
    end: int, m: int, n: int, k: int, warps: int, stages: int, swap: bool = False
) -> tuple[int, GemmConfig]:
    return end, GemmConfig(m, n, k, warps, stages, swap)


def _by_tma(
    end: int,
    m: int,
    n: int,
    stages: int,
    promote: int | None = None,
    k: int = 128,
    warps: int = 8,
) -> tuple[int, GemmConfig]:
    return end, GemmConfig(m, n, k, warps, stages, promote=promote, tma=True)


def _promoted(rows: Rows) -> Rows:
    """The same rows with Hopper's accumulator promoted every 128 products."""
    return tuple((end, replace(config, promote=FP8_BLOCK)) for end, config in rows)


def _of_64_threads(rows: Rows) -> Rows:
    """The same rows for warps of 64 threads, of which half as many make the same threads."""
    return tuple((end, replace(config, num_warps=config.num_warps // 2)) for end, config in rows)


# Chosen by compiling: no spills, 128-bit loads, the widest matrix instruction, on triton 3.6 and
# 3.9. Register pressure is what limits tiles: block scales take twice the accumulators.
_FP32: Rows = (_row(16, 16, 32, 32, 4, 3), _row(ANY_M, 32, 32, 32, 8, 2))

# Small programs of few warps: the fastest tile of a prototype on an H100 for 28672 x 4096, with two
# partial sums there, whose reduction was not counted.
_GEMV: Rows = (_row(ANY_M, 1, 4, 2048, 2, 1),)
# The same threads and bytes; not measured yet.
_GEMV_E4M3: Rows = (_row(ANY_M, 1, 4, 1024, 2, 1),)

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

# Measured on an H200, bench/results: one of the fastest of forty tiles, pipelines and splits on
# the products of an 8B layer. (Not measured: block scales and decoded weights by 32 to 256 rows,
# chosen by compiling.) What counts with few rows is that all programs are resident at once. Few
# rows of x are the N side of a wgmma, whose M side is 64 rows of the weight for every 4 warps. They
# have to be: as the M side, rows that a program quantizes itself come from registers, and Hopper's
# sums then have other bits than from shared memory.
_WGMMA_FP8: Rows = (
    _row(16, 16, 64, 128, 4, 4, swap=True),
    _row(32, 32, 128, 128, 8, 4, swap=True),
    _row(64, 64, 128, 128, 8, 4, swap=True),
    _row(128, 128, 64, 128, 4, 4, swap=True),
    _row(256, 128, 64, 128, 8, 4),
    _row(512, 128, 128, 128, 8, 4),  # of the tile that TMA has for as many
)
# A decoded weight goes from registers into the instruction if it is the M side.
_WGMMA_HALF: Rows = (
    _row(16, 16, 64, 128, 4, 3, swap=True),
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
            _row(16, 16, 64, 128, 4, 4, swap=True),
            _row(32, 32, 128, 128, 4, 4, swap=True),
            _row(64, 64, 128, 128, 8, 4, swap=True),
            _row(ANY_M, 128, 128, 128, 8, 3),
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
        # A step's 512 exponents of 128 rows are four for each of 128 threads, as few as a copy to
        # shared memory takes; of more threads they would be waited for.
        Kind.MXFP8: (
            *_TCGEN05_FEW[:2],
            _row(64, 64, 128, 128, 4, 4, swap=True),
            _row(ANY_M, 128, 128, 128, 4, 4),
        ),
    }
)

_MFMA_HALF: Rows = (
    _row(16, 16, 64, 64, 4, 2),
    _row(32, 32, 64, 64, 4, 2),
    _row(ANY_M, 64, 64, 64, 4, 2),
)
# Codes by codes: K steps of 128 take CDNA 4's widest instruction. On CDNA 3 both operands are first
# brought to its own form, of which larger tiles need less. Compiled, not measured.
_FNUZ: Rows = (
    _row(16, 16, 64, 128, 4, 2),
    _row(32, 32, 64, 128, 4, 2),
    _row(ANY_M, 64, 128, 128, 8, 2),
)
_MFMA_FP8: Rows = (*_FNUZ[:-1], _row(64, 64, 128, 128, 8, 2), _row(ANY_M, 128, 128, 128, 8, 2))
_MFMA: Mapping[Kind, Rows] = MappingProxyType(
    {
        Kind.FP8: _MFMA_FP8,
        Kind.FP8_BLOCK: _MFMA_FP8,
        Kind.MXFP8: _MFMA_FP8,
        Kind.HALF_FP8: _MFMA_HALF,
        Kind.HALF_BLOCK: _MFMA_HALF,
        Kind.HALF_NVFP4: _MFMA_HALF,
        Kind.HALF_MXFP8: _MFMA_HALF,
    }
)

_TABLES: Mapping[Table, Mapping[Kind, Rows]] = MappingProxyType(
    {
        "bits": MappingProxyType({Kind.FP8: _BITS, Kind.FP8_BLOCK: _BITS}),
        "fnuz": MappingProxyType({Kind.FP8: _FNUZ, Kind.FP8_BLOCK: _FNUZ}),
        "mma": _MMA,
        "mma_scaled": _MMA,
        "wgmma": _WGMMA,
        "tcgen05": _TCGEN05,
        "mfma": _MFMA,
    }
)

_SERIAL_BUCKETS: Mapping[tuple[Table, Kind], int] = MappingProxyType(
    {
        ("bits", Kind.FP8_BLOCK): 32,
        ("mma", Kind.HALF_BLOCK): 64,
        ("mma", Kind.HALF_MXFP8): 64,
        ("mma_scaled", Kind.HALF_BLOCK): 64,
        ("mma_scaled", Kind.HALF_NVFP4): 64,
        ("mma_scaled", Kind.NVFP4): 64,
        ("mma_scaled", Kind.MXFP8): 64,
        ("wgmma", Kind.FP8_FAST): 512,
        ("tcgen05", Kind.MXFP8): 64,
    }
)

# Many rows, where TMA can read the operands. The fastest of a search on an H200 with 2048 rows;
# with fast accumulation 128x256 and 256x128 are level. On sm_100, where nothing was measured, the
# largest that does not spill at the end of a tile. Rows take the place of those above from the
# first bucket on, each bucket being twice the one before; where that one splits K, both tables have
# to have the same tile.
#
# A weight that is decoded first costs 2.6 (NVFP4) or 3 bytes of traffic an item, whatever M is: for
# 28672 x 4096 at 4 TB/s 75 or 90 us. A row of x then takes 0.33 us at the rate of a bf16 product,
# and where the weight is decoded in the product 0.63 to 0.75 (NVFP4) or 0.68 to 1.0 us (MXFP8),
# measured on an H200. So the two ways meet between 130 and 260 rows.
_DECODED: Rows = (_by_tma(512, 128, 256, 4, k=64), _by_tma(ANY_M, 128, 256, 4, k=64))
_BY_TMA: Mapping[tuple[Table, Kind], Rows] = MappingProxyType(
    {
        ("wgmma", Kind.FP8): (
            _by_tma(512, 128, 128, 5, FP8_BLOCK),
            _by_tma(ANY_M, 256, 128, 3, FP8_BLOCK),
        ),
        ("wgmma", Kind.FP8_FAST): (_by_tma(512, 128, 128, 5), _by_tma(ANY_M, 128, 256, 3)),
        ("wgmma", Kind.HALF_NVFP4): _DECODED,
        ("wgmma", Kind.HALF_MXFP8): _DECODED,
        ("tcgen05", Kind.FP8): (_by_tma(512, 128, 128, 4), _by_tma(ANY_M, 128, 256, 4)),
        # Scales of 256 rows would go through registers.
        ("tcgen05", Kind.NVFP4): (
            _by_tma(512, 128, 128, 4, k=256),
            _by_tma(ANY_M, 128, 128, 4, k=256),
        ),
        ("tcgen05", Kind.MXFP8): (
            _by_tma(512, 128, 128, 4, warps=4),
            _by_tma(ANY_M, 128, 128, 4, warps=4),
        ),
        ("tcgen05", Kind.HALF_NVFP4): _DECODED,
        ("tcgen05", Kind.HALF_MXFP8): _DECODED,
    }
)

# Few rows that need not add as many do: x is the M side of mma.sync, which every warp issues for
# itself, and a decoded weight goes from registers into it without a wait for other warps. Rows take
# the place of as many of those above. A warp has 32 rows of the weight, so that x, which each
# program reads and each warp permutes, costs little beside them.
_BY_WARPS: Mapping[tuple[Table, Kind], Rows] = MappingProxyType(
    {
        ("wgmma", Kind.HALF_NVFP4): (
            _row(16, 16, 128, 128, 4, 4),
            _row(32, 32, 128, 128, 4, 4),
        ),
    }
)
