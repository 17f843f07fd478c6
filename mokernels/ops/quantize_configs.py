"""Tile sizes of the quantize kernels: pure functions of the shape and the device's size.

They change speed only, except for :func:`norm_tile`. What they weigh: a program should have about
32 elements for each thread, so that enough loads are in flight, and a small tensor should still
give every processor a program.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

LONGEST_ROW = 16384
"""Longest row that one program keeps in registers; longer ones are read twice."""
_PASS = 8192
_NORM_PASS = 4096  # the three loops of a norm over 8192 columns would spill
_TILE = 4096
_SMALLEST_TILE = 512
_WIDEST_TILE = 1024
_NARROWEST_NORM = 128  # the widest block of a format
_THREADS = 32


class Tile(NamedTuple):
    """What one program computes.

    Attributes:
        rows: rows of the tile, a power of two.
        columns: columns, a power of two.
        warps: of 32 threads.
    """

    rows: int
    columns: int
    warps: int

    def programs(self, rows: int, k: int) -> int:
        """Number of tiles that cover [rows, k]."""
        return -(-rows // self.rows) * -(-k // self.columns)


@lru_cache(maxsize=4096)
def block_tile(rows: int, k: int, group: int, processors: int) -> Tile:
    """The tile for kernels that treat every ``group`` elements of a row by themselves.

    Args:
        rows: number of rows.
        k: elements of a row.
        group: the number of columns is a multiple of it.
        processors: multiprocessors of the device.
    """
    elements = _TILE
    while elements > _SMALLEST_TILE and rows * k < 2 * processors * elements:
        elements //= 2
    widest = elements if rows == 1 else min(elements, _WIDEST_TILE)
    columns = max(min(_power_of_two(k), widest), group, 16)
    height = max(1, min(elements // columns, _power_of_two(rows)))
    return Tile(height, columns, _warps(height * columns, per_thread=32))


@lru_cache(maxsize=4096)
def row_tile(rows: int, k: int, processors: int) -> Tile:
    """The tile for kernels that reduce whole rows; narrower than K if K is above LONGEST_ROW."""
    columns = max(_power_of_two(k), 16) if k <= LONGEST_ROW else _PASS
    height = 1
    while 2 * height * columns <= _TILE // 2 and rows >= 4 * height * processors:
        height *= 2
    return Tile(height, columns, _warps(height * columns, per_thread=16))


@lru_cache(maxsize=4096)
def norm_tile(k: int) -> Tile:
    """The tile for kernels that normalize a row of k elements and quantize it.

    It is a function of k alone, unlike the other tiles. Here something is added: the tile fixes the
    order of the additions, thus the last bits of the sum of squares, thus codes. If it followed the
    number of rows or the device's size, a token would get other codes alone than in a batch, and
    other codes on another device.
    """
    columns = max(_power_of_two(k), _NARROWEST_NORM) if k <= LONGEST_ROW else _NORM_PASS
    return Tile(1, columns, _warps(columns, per_thread=16))


def _warps(elements: int, per_thread: int) -> int:
    return min(16, max(1, elements // (per_thread * _THREADS)))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (and 1)."""
    return 1 << max(0, n - 1).bit_length()
