"""Planted faults are found; correct kernels are left alone."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.support.sanitizer import MemoryFault

pytestmark = pytest.mark.usefixtures("interpreted")


@triton.jit
def copy_kernel(x, y, n, stride, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        value = tl.load(x + offsets * stride, mask=offsets < n, other=0.0)
    else:
        value = tl.load(x + offsets * stride)
    tl.store(y + offsets, value, mask=offsets < n)


@triton.jit
def store_kernel(y, step, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(y + offsets, offsets)


@triton.jit
def shift_kernel(x, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets + BLOCK)
    tl.store(x + offsets + BLOCK, value)
    tl.store(x + offsets, tl.load(x + offsets) + value)


def test_masked_tail_is_fine():
    x, y = torch.randn(100), torch.empty(100)
    copy_kernel[(2,)](x, y, 100, 1, MASKED=True, BLOCK=64)
    assert torch.equal(x, y)


def test_load_past_the_end():
    x, y = torch.randn(100), torch.empty(100)
    wanted = r"load out of bounds in program \(1, 0, 0\): 28 of 64 .* argument x \(100,\)"
    with pytest.raises(MemoryFault, match=wanted):
        copy_kernel[(2,)](x, y, 100, 1, MASKED=False, BLOCK=64)


def test_load_from_the_gap_of_a_view():
    wide = torch.randn(16, 4)
    y = torch.empty(64)
    copy_kernel[(1,)](wide[:, 0], y, 16, 4, MASKED=True, BLOCK=64)
    with pytest.raises(MemoryFault, match="load out of bounds"):
        copy_kernel[(1,)](wide[:, 0], y, 16, 3, MASKED=True, BLOCK=64)


def test_load_that_lands_in_another_argument():
    both = torch.randn(128)
    with pytest.raises(MemoryFault, match="36 of 64 addresses are no element of argument x"):
        copy_kernel[(1,)](both[:28], both[28:], 28, 1, MASKED=False, BLOCK=64)


def test_store_past_the_end():
    y = torch.empty(100, dtype=torch.int32)
    with pytest.raises(MemoryFault, match=r"store out of bounds .* 28 of 64"):
        store_kernel[(2,)](y, 64, BLOCK=64)


def test_store_by_two_programs():
    y = torch.empty(128, dtype=torch.int32)
    store_kernel[(2,)](y, 64, BLOCK=64)
    with pytest.raises(MemoryFault, match=r"program \(1, 0, 0\) stores bytes that program \(0"):
        store_kernel[(2,)](y, 63, BLOCK=64)


def test_load_of_what_another_program_stored():
    with pytest.raises(MemoryFault, match="loads bytes that program"):
        shift_kernel[(2,)](torch.zeros(192), BLOCK=64)


@triton.jit
def twice_kernel(y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK) // 2, tl.arange(0, BLOCK))


def test_two_lanes_store_to_one_address():
    with pytest.raises(MemoryFault, match="stores to one address twice"):
        twice_kernel[(1,)](torch.empty(64, dtype=torch.int32), BLOCK=64)


@triton.jit
def last_reduces_kernel(x, partial, counter, out, SEM: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    pid = tl.program_id(0)
    tl.store(partial + pid * BLOCK + offsets, tl.load(x + pid * BLOCK + offsets))
    if tl.atomic_add(counter, 1, sem=SEM) == tl.num_programs(0) - 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for i in range(tl.num_programs(0)):
            total += tl.load(partial + i * BLOCK + offsets)
        tl.store(out + offsets, total)


def test_the_last_program_may_read_what_the_others_released():
    x, partial, out = torch.randn(4, 16), torch.empty(4, 16), torch.empty(16)
    arguments = (x, partial, torch.zeros(1, dtype=torch.int32), out)
    last_reduces_kernel[(4,)](*arguments, SEM="acq_rel", BLOCK=16)
    assert torch.equal(out, x[0] + x[1] + x[2] + x[3])


@pytest.mark.parametrize("sem", ["relaxed", "acquire", "release"])
def test_half_a_synchronisation_is_a_race(sem):
    arguments = (torch.randn(4, 16), torch.empty(4, 16), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(MemoryFault, match="loads bytes that program"):
        last_reduces_kernel[(4,)](*arguments, torch.empty(16), SEM=sem, BLOCK=16)


@triton.jit
def count_kernel(counter, BLOCK: tl.constexpr):
    tl.atomic_add(counter + tl.arange(0, BLOCK), 1)


def test_atomic_past_the_end():
    with pytest.raises(MemoryFault, match=r"atomic out of bounds .* 1 of 4"):
        count_kernel[(1,)](torch.zeros(3, dtype=torch.int32), BLOCK=4)


def test_new_tensors_are_poisoned():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        assert torch.empty(3, dtype=dtype).isnan().all()
        assert torch.zeros(2).new_empty((3,), dtype=dtype).isnan().all()
    assert (torch.empty_like(torch.zeros(3, dtype=torch.uint8)) == 255).all()
