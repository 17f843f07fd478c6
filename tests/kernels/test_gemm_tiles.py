"""Device functions that the GEMM kernels share, one by one."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from mokernels.ops.kernels.tiles import (
    no_parts,
    number_of_parts,
    row_pointers,
    split_bounds,
    tile_of_program,
)


@triton.jit
def offsets_kernel(x, out, stride, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    offsets = row_pointers(x, rows, stride).to(tl.int64) - x.to(tl.int64)
    tl.store(out + rows[:, None], offsets)


def test_row_offsets_are_64_bit(device):
    # Only addresses are computed: the tensor of 2 ** 34 bytes does not exist.
    stride = 2**30 + 16
    x, out = torch.zeros(1, dtype=torch.uint8, device=device), torch.zeros(16, device=device)
    out = out.to(torch.int64)
    offsets_kernel[(1,)](x, out, stride, BLOCK=16)
    assert out.tolist() == [row * stride for row in range(16)]


@triton.jit
def tiles_kernel(out, M, N, BLOCK: tl.constexpr, GROUP_M: tl.constexpr):
    row, column = tile_of_program(M, N, BLOCK, BLOCK, GROUP_M)
    tl.store(out + tl.program_id(0) * 2, row)
    tl.store(out + tl.program_id(0) * 2 + 1, column)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 300), (300, 1), (100, 200), (161, 97), (520, 33)])
@pytest.mark.parametrize("group", [1, 8])
def test_every_tile_has_one_program(device, m, n, group):
    rows, columns = -(-m // 32), -(-n // 32)
    out = torch.full((rows * columns, 2), -1, device=device)
    tiles_kernel[(rows * columns,)](out, m, n, BLOCK=32, GROUP_M=group)
    found = [tuple(tile) for tile in out.tolist()]
    assert sorted(found) == [(row, column) for row in range(rows) for column in range(columns)]
    # Down a group of rows first, then along the columns.
    height = min(group, rows)
    assert found[:height] == [(row, 0) for row in range(height)]


@triton.jit
def bounds_kernel(out, K, blocks, BLOCK_K: tl.constexpr):
    start, stop = split_bounds(tl.program_id(1), K, blocks, BLOCK_K)
    tl.store(out + tl.program_id(1) * 2, start)
    tl.store(out + tl.program_id(1) * 2 + 1, stop)


def test_splits_share_k(device):
    out = torch.zeros(3, 2, dtype=torch.int32, device=device)
    bounds_kernel[(1, 3, 1)](out, 1100, 3, BLOCK_K=128)
    assert out.tolist() == [[0, 384], [384, 768], [768, 1100]]


@triton.jit
def parts_kernel(out, K, blocks, BLOCK_K: tl.constexpr):
    tl.store(out, number_of_parts(K, blocks, BLOCK_K))


@pytest.mark.parametrize(("k", "parts"), [(128, 1), (384, 1), (385, 2), (1100, 3)])
def test_parts_cover_k(device, k, parts):
    out = torch.zeros(1, dtype=torch.int32, device=device)
    parts_kernel[(1,)](out, k, 3, BLOCK_K=128)
    assert out.tolist() == [parts]


@triton.jit
def first_part_kernel(x, out):
    index = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + index, no_parts(16, 16, False) + tl.load(x + index))


def test_the_first_part_keeps_its_bits(device):
    x = torch.full((16, 16), -0.0, device=device)
    x[0, 1:4] = torch.tensor([1e-45, float("-inf"), 0.0])
    out = torch.full_like(x, float("nan"))
    first_part_kernel[(1,)](x, out)
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))
