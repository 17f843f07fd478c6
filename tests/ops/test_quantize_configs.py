"""The tile sizes of the quantize kernels, which need no device to be looked at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mokernels.ops.quantize_configs import LONGEST_ROW, block_tile, norm_tile, row_tile

sizes = st.integers(0, 300_000)
processors = st.integers(1, 304)


@given(sizes, sizes, st.sampled_from([1, 16, 32, 128]), processors)
def test_block_tiles_are_whole_groups_of_a_legal_size(rows, k, group, processors):
    tile = block_tile(rows, k, group, processors)
    assert tile.columns % group == 0
    assert tile.columns >= 16
    for size in (tile.rows, tile.columns, tile.warps):
        assert size & (size - 1) == 0
    assert tile.rows * tile.columns <= 4096
    assert tile.rows * tile.columns / tile.warps / 32 >= 16 or tile.warps == 1
    assert tile.programs(rows, k) * tile.rows * tile.columns >= rows * k


@given(sizes, sizes, processors)
def test_row_tiles_hold_a_row_or_pass_over_it(rows, k, processors):
    tile = row_tile(rows, k, processors)
    assert (tile.columns >= k) == (k <= LONGEST_ROW)
    for size in (tile.rows, tile.columns, tile.warps):
        assert size & (size - 1) == 0
    assert tile.rows == 1 or tile.rows * tile.columns <= 2048
    assert tile.warps <= 16


@given(sizes)
def test_norm_tiles_hold_a_row_or_pass_over_it(k):
    tile = norm_tile(k)
    assert tile.rows == 1
    assert (tile.columns >= k) == (k <= LONGEST_ROW)
    assert tile.columns % 128 == 0
    for size in (tile.columns, tile.warps):
        assert size & (size - 1) == 0
    # At most 32 values for a thread, which stay in registers.
    assert tile.columns <= 32 * 32 * tile.warps


@pytest.mark.parametrize(
    ("rows", "k", "programs"), [(1, 4096, 8), (4096, 4096, 4096), (64, 4096, 512), (0, 64, 0)]
)
def test_a_small_tensor_is_spread_over_the_device(rows, k, programs):
    assert block_tile(rows, k, 16, 132).programs(rows, k) == programs
