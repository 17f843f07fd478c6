"""The tile functions against mokernels.numerics, to the bit, on every value that matters."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from mokernels import numerics
from mokernels.ops.kernels import elements as e
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, target_of
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting

BLOCK = 4096
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def targets() -> list:
    """Every target's choices under the interpreter; only its own on a GPU."""
    if interpreting():
        return [*CUDA_TARGETS, *HIP_TARGETS]
    return [target_of(torch.device("cuda", 0))] if torch.cuda.is_available() else []


both_ways = pytest.mark.parametrize("native", sorted({t.casts_fp8_once for t in targets()}))
every_dtype = pytest.mark.parametrize("dtype", TRITON_DTYPES, ids=str)


def interesting_values() -> torch.Tensor:
    """Every bf16 value, and the fp32 neighbours of every e4m3 and e2m1 value and tie."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = torch.cat([codes, torch.tensor([5.0, 2.5, 3.5, 0.25, 0.75, 1.25, 1.75, 6.0, 464.0])])
    points = torch.cat([grid, (codes[:-1] + codes[1:]) / 2]).view(torch.int32)
    near = torch.cat([points + step for step in range(-2, 3)]).view(torch.float32)
    values = torch.cat([every, near, -near])
    return torch.cat([values, values.new_zeros(-values.numel() % BLOCK)])


@triton.jit
def encode_e4m3_kernel(x, y, NATIVE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, e.encode_e4m3(tl.load(x + offsets), NATIVE))


@triton.jit
def encode_e2m1_kernel(x, y, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, e.encode_e2m1(tl.load(x + offsets)))


@triton.jit
def decode_kernel(codes, y, WHICH: tl.constexpr, NATIVE: tl.constexpr, KEEP_NAN: tl.constexpr):
    offsets = tl.arange(0, 256)
    code = tl.load(codes + offsets)
    DTYPE: tl.constexpr = y.dtype.element_ty
    if WHICH == "e4m3":
        value = e.decode_e4m3(code, DTYPE, NATIVE, KEEP_NAN)
    elif WHICH == "e2m1":
        value = e.decode_e2m1(code, DTYPE)
    else:
        value = e.decode_e8m0(code, DTYPE)
    tl.store(y + offsets, value)


@triton.jit
def pack_kernel(codes, packed, unpacked, R: tl.constexpr, K: tl.constexpr):
    rows = tl.arange(0, R)[:, None]
    columns, halves = tl.arange(0, K)[None, :], tl.arange(0, K // 2)[None, :]
    bytes_ = e.pack_nibbles(tl.load(codes + rows * K + columns))
    tl.store(packed + rows * (K // 2) + halves, bytes_)
    tl.store(unpacked + rows * K + columns, e.unpack_nibbles(bytes_))


@both_ways
def test_encode_e4m3(device, native):
    x = interesting_values().to(device)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
    encode_e4m3_kernel[(x.numel() // BLOCK,)](x, codes, NATIVE=native, BLOCK=BLOCK)
    assert_same_bits(codes.view(torch.float8_e4m3fn), numerics.encode_e4m3(x))


def test_encode_e2m1(device):
    x = interesting_values().to(device)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
    encode_e2m1_kernel[(x.numel() // BLOCK,)](x, codes, BLOCK=BLOCK)
    assert_same_bits(codes, numerics.encode_e2m1(x))


@triton.jit
def encode_quotient_kernel(x, steps, kept, y, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    row = tl.program_id(0)
    step = tl.load(steps + row + tl.zeros((1, 1), tl.int32))
    keep = tl.load(kept + row + tl.zeros((1, 1), tl.int32)) != 0
    code = e.encode_e2m1_quotient(tl.load(x + column), step, keep)
    tl.store(y + row * BLOCK + column, code)


def test_encode_e2m1_quotient(device):
    # 0.5 / (2 - 2**-23) is a quotient next to a tie that the reciprocal alone gets wrong.
    x = torch.cat([interesting_values()[::9], torch.tensor([0.0, -0.0, 0.5, -0.5])])
    block = 16384
    x = torch.cat([x, x.new_zeros(block - x.numel())]).to(device)
    inf, nan = float("inf"), float("nan")
    steps = torch.tensor(
        [1.0, 0.3, 1e-5, 7.7e-4, 13.37, 5e37, 448.0, 2 - 2.0**-23, inf, nan, 0.0, 1.0, nan]
    )
    kept = torch.tensor([1] * 10 + [0, 0, 0], dtype=torch.uint8)
    codes = torch.empty(len(steps), block, dtype=torch.uint8, device=device)
    steps, kept = steps.to(device), kept.to(device)
    encode_quotient_kernel[(len(steps),)](x, steps, kept, codes, BLOCK=block)
    expected = numerics.encode_e2m1(x / steps[:, None]) * kept[:, None]
    assert_same_bits(codes, expected)


def decoded(device, which: str, dtype: torch.dtype, native: bool = False, keep_nan: bool = True):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).to(device)
    y = torch.empty(256, dtype=dtype, device=device)
    decode_kernel[(1,)](codes, y, WHICH=which, NATIVE=native, KEEP_NAN=keep_nan)
    return codes, y


@both_ways
@every_dtype
def test_decode_e4m3(device, native, dtype):
    codes, y = decoded(device, "e4m3", dtype, native)
    assert_same_bits(y, numerics.decode_e4m3(codes).to(dtype))


@every_dtype
def test_decode_e4m3_may_drop_nan(device, dtype):
    codes, y = decoded(device, "e4m3", dtype, keep_nan=False)
    expected = numerics.decode_e4m3(codes)
    expected[0x7F], expected[0xFF] = 480, -480
    assert_same_bits(y, expected.to(dtype))


@triton.jit
def fnuz_kernel(codes, y):
    offsets = tl.arange(0, 8)[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(y + offsets, e.fnuz_of_e4m3(tl.load(codes + offsets)))


def test_e4m3fnuz_has_half_of_every_value(device):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).to(device)
    y = torch.empty_like(codes)
    fnuz_kernel[(1,)](codes, y)
    halves = y.view(torch.float8_e4m3fnuz).float()
    expected = numerics.decode_e4m3(codes) / 2
    assert torch.equal(halves.isnan(), expected.isnan())
    assert torch.equal(halves.nan_to_num(), expected.nan_to_num())


@every_dtype
def test_decode_e2m1(device, dtype):
    codes, y = decoded(device, "e2m1", dtype)
    assert_same_bits(y, numerics.decode_e2m1(codes).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_e8m0(device, dtype):
    codes, y = decoded(device, "e8m0", dtype)
    assert_same_bits(y, numerics.decode_e8m0(codes).to(dtype))
    assert y[0].item() == 2.0**-127


def test_pack_and_unpack_nibbles(device):
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0))
    codes = codes.to(torch.uint8).to(device)
    packed = torch.empty(8, 32, dtype=torch.uint8, device=device)
    unpacked = torch.empty_like(codes)
    pack_kernel[(1,)](codes, packed, unpacked, R=8, K=64)
    assert torch.equal(packed, numerics.pack_nibbles(codes))
    assert torch.equal(unpacked, codes)
