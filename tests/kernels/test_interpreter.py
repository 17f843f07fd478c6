"""The repaired interpreter computes what a GPU computes; an upgrade that breaks it fails here.

Expected values come from torch's own casts on all 65536 bf16 values (which hold every exponent,
every subnormal of e4m3 and every tie between e4m3 neighbours) and from literals.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.support.compare import assert_same_bits
from tests.support.interpreted_dots import model_of
from tests.support.interpreted_numbers import decode, encode
from tests.support.interpreted_ptx import emulate

pytestmark = pytest.mark.usefixtures("interpreted")

ALL_BF16 = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
ALL_E4M3 = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)


@triton.jit
def cast_kernel(x, y, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets).to(y.dtype.element_ty))


@triton.jit
def truncate_kernel(x, y, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets).to(y.dtype.element_ty, fp_downcast_rounding="rtz")
    tl.store(y + offsets, value)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, y, BLOCK=x.numel())
    return y


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_cast_to_e4m3_rounds_to_nearest_and_saturates(source):
    expected = ALL_BF16.float().clamp(-448, 448).to(torch.float8_e4m3fn)
    assert_same_bits(cast(ALL_BF16.to(source), torch.float8_e4m3fn), expected)


def test_cast_to_e4m3_on_values_written_out():
    values = [31 * 2.0**-10, 464.0, 1e5, -float("inf"), 2.0**-10, 3 * 2.0**-10, 17.0, 19.0]
    expected = [0.03125, 448.0, 448.0, -448.0, 0.0, 2.0**-8, 16.0, 20.0]
    assert cast(torch.tensor(values), torch.float8_e4m3fn).tolist() == expected


def test_cast_to_bf16_rounds_to_even():
    # bf16 neighbours of 1 are 2**-7 apart: the ties 1 + 2**-8 and 1 + 3 * 2**-8 go to even.
    x = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 3.4e38])
    expected = [1.0, 1 + 2.0**-6, 1 + 2.0**-7, float("inf")]
    assert cast(x, torch.bfloat16).tolist() == expected
    noise = torch.randn(65536, generator=torch.Generator().manual_seed(0))
    assert_same_bits(cast(ALL_BF16.float() * noise, torch.bfloat16), (ALL_BF16 * noise).bfloat16())


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.bfloat16])
def test_e4m3_decodes_exactly(target):
    assert_same_bits(cast(ALL_E4M3, target), ALL_E4M3.float().to(target))


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_truncation_goes_towards_zero(target):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    y = torch.empty(4096, dtype=target)
    truncate_kernel[(1,)](x, y, BLOCK=4096)
    assert (y.float().abs() <= x.abs()).all()
    nearest = x.to(target)
    kept = nearest.float().abs() <= x.abs()
    assert torch.equal(y[kept], nearest[kept])
    assert torch.equal((nearest.view(torch.int16) - 1)[~kept], y.view(torch.int16)[~kept])


def test_ints_and_bf16():
    x = torch.tensor([0, 1, -3, 257, 259, 70000, 5, 6])
    assert_same_bits(cast(x.to(torch.int32), torch.bfloat16), x.to(torch.bfloat16))
    y = torch.tensor([0, 1.5, -3.75, 256, -1000], dtype=torch.bfloat16).repeat(2)[:8].contiguous()
    assert torch.equal(cast(y, torch.int32), y.to(torch.int32))


@triton.jit
def arithmetic_kernel(x, y, out, greater, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    a = tl.load(x + offsets)
    b = tl.load(y + offsets)
    tl.store(out + offsets, -(a * b + a) - 1.5)
    tl.store(greater + offsets, (a > b).to(tl.int8))


def test_bf16_arithmetic_rounds_after_every_operation():
    a, b = torch.randn(2, 1024, generator=torch.Generator().manual_seed(2)).bfloat16()
    out, greater = torch.empty(1024, dtype=torch.bfloat16), torch.empty(1024, dtype=torch.int8)
    arithmetic_kernel[(1,)](a, b, out, greater, BLOCK=1024)
    assert_same_bits(out, -(a * b + a) - 1.5)
    assert torch.equal(greater.bool(), a > b)


@triton.jit
def select_kernel(x, y, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.where(offsets % 2 == 0, tl.load(x + offsets), tl.load(y + offsets)))


@pytest.mark.parametrize("values", [ALL_BF16, ALL_E4M3], ids=["bf16", "e4m3"])
def test_select_keeps_every_bit(values):
    out = torch.empty_like(values)
    select_kernel[(1,)](values, values, out, BLOCK=values.numel())
    words = torch.int16 if values.element_size() == 2 else torch.uint8
    assert torch.equal(out.view(words), values.view(words))


@triton.jit
def add_kernel(x, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets)
    tl.store(out + offsets, v + v)


@triton.jit
def sum_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), axis=0))


def test_what_is_not_modelled_is_refused():
    codes = ALL_E4M3.clone()
    with pytest.raises(Exception, match=r"no arithmetic on .*fp8e4nv.*cast to tl.float32 first"):
        add_kernel[(1,)](codes, codes, BLOCK=256)
    x = torch.ones(64, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="reductions of bf16 depend on the order"):
        sum_kernel[(1,)](x, x, BLOCK=64)
    with pytest.raises(Exception, match="casts from fp64 round twice"):
        cast_kernel[(1,)](x.double(), x, BLOCK=64)


@triton.jit
def nan_kernel(x, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    v = tl.load(x + offsets)
    tl.store(out + offsets, tl.maximum(v, -448.0))
    tl.store(out + BLOCK + offsets, tl.minimum(v, 448.0))
    tl.store(out + 2 * BLOCK + offsets, tl.clamp(v, -448.0, 448.0))
    tl.store(out + 3 * BLOCK + offsets, tl.maximum(v, -448.0, propagate_nan=tl.PropagateNan.ALL))
    clamped = tl.clamp(v, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + 4 * BLOCK + offsets, clamped)
    tl.store(out + 5 * BLOCK + offsets, tl.max(v, axis=0))


def test_nan_rules_of_minimum_maximum_and_clamp():
    x = torch.tensor([float("nan"), 1.0, -500.0, 500.0])
    out = torch.empty(6, 4)
    nan_kernel[(1,)](x, out, BLOCK=4)
    nan = float("nan")
    expected = [
        [-448.0, 1.0, -448.0, 500.0],
        [448.0, 1.0, -500.0, 448.0],
        [-448.0, 1.0, -448.0, 448.0],
        [nan, 1.0, -448.0, 500.0],
        [nan, 1.0, -448.0, 448.0],
        [500.0] * 4,
    ]
    torch.testing.assert_close(out, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    lhs = tl.load(a + m[:, None] * K + k[None, :])
    rhs = tl.load(b + n[None, :] * K + k[:, None])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(lhs, rhs, tl.full((M, N), 1.0, tl.float32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dot_of_small_integers_is_exact(dtype):
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(-8, 9, (16, 64), generator=generator).float().to(dtype)
    b = torch.randint(-8, 9, (32, 64), generator=generator).float().to(dtype)
    out = torch.empty(16, 32)
    dot_kernel[(1,)](a, b, out, M=16, N=32, K=64)
    assert torch.equal(out, a.float() @ b.float().T + 1)


@triton.jit
def dot_scaled_kernel(
    a, a_scale, b, b_scale, out, ELEMENT: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr
):
    K: tl.constexpr = 64
    m, k, g = tl.arange(0, 32), tl.arange(0, K // PACKED), tl.arange(0, K // GROUP)
    lhs = tl.load(a + m[:, None] * (K // PACKED) + k[None, :])
    rhs = tl.load(b + m[None, :] * (K // PACKED) + k[:, None])
    lhs_scale = tl.load(a_scale + m[:, None] * (K // GROUP) + g[None, :])
    rhs_scale = tl.load(b_scale + m[:, None] * (K // GROUP) + g[None, :])
    acc = tl.dot_scaled(lhs, lhs_scale, ELEMENT, rhs, rhs_scale, ELEMENT)
    tl.store(out + m[:, None] * 32 + m[None, :], acc)


def _e2m1(codes: torch.Tensor) -> torch.Tensor:
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).long()
    return magnitudes[pairs & 7] * (1 - 2 * (pairs >> 3))


def test_dot_scaled_of_e2m1_with_e4m3_scales():
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randint(0, 256, (2, 32, 32), generator=generator).to(torch.uint8)
    scales = torch.randint(1, 17, (2, 32, 4), generator=generator).float().to(torch.float8_e4m3fn)
    out = torch.empty(32, 32)
    dot_scaled_kernel[(1,)](a, scales[0], b, scales[1], out, ELEMENT="e2m1", PACKED=2, GROUP=16)
    lhs, rhs = (
        _e2m1(codes) * scale.float().repeat_interleave(16, dim=1)
        for codes, scale in zip((a, b), scales, strict=True)
    )
    # Multiples of 1/4 below 2**18: exact in fp32 in any order.
    assert torch.equal(out, lhs @ rhs.T)


def test_dot_scaled_of_e4m3_with_exponents():
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randint(-8, 9, (2, 32, 64), generator=generator).float().to(torch.float8_e4m3fn)
    exponents = torch.randint(124, 131, (2, 32, 2), generator=generator).to(torch.uint8)
    out = torch.empty(32, 32)
    arguments = (a, exponents[0], b, exponents[1], out)
    dot_scaled_kernel[(1,)](*arguments, ELEMENT="e4m3", PACKED=1, GROUP=32)
    lhs, rhs = (
        codes.float() * torch.exp2(e.float() - 127).repeat_interleave(32, dim=1)
        for codes, e in zip((a, b), exponents, strict=True)
    )
    assert torch.equal(out, lhs @ rhs.T)


@triton.jit
def fma_kernel(x, y, z, out, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.fma(tl.load(x + offsets), tl.load(y + offsets), tl.load(z + offsets))
    tl.store(out + offsets, value)


def test_fma_rounds_once():
    x = torch.tensor([1 + 2.0**-12, 1 + 2.0**-23, 3.0, 2.0**-100])
    z = torch.tensor([-1 - 2.0**-11, -1 - 2.0**-22, 1.0, 1.0])
    out = torch.empty(4)
    fma_kernel[(1,)](x, x, z, out, BLOCK=4)
    # (1 + e)**2 - 1 - 2 e = e**2 exactly; rounding the product first would lose it.
    assert out.tolist() == [2.0**-24, 2.0**-46, 10.0, 1.0]


@triton.jit
def loop_kernel(out, rounds):
    total = 0
    first = tl.load(out)
    for i in range(first, rounds, 2):
        total += i
    tl.store(out, total)


def test_a_loaded_value_bounds_a_loop():
    out = torch.tensor([1], dtype=torch.int32)
    loop_kernel[(1,)](out, 8)
    assert out.item() == 1 + 3 + 5 + 7


TWELVE: tl.constexpr = tl.constexpr(12)


@triton.jit
def constant_kernel(x, out):
    v = tl.load(x)
    tl.store(out, TWELVE * v)
    tl.store(out + 1, TWELVE - v)
    tl.store(out + 2, TWELVE // v)
    tl.store(out + 3, (v < TWELVE).to(tl.int32))


def test_a_constant_may_stand_on_the_left():
    out = torch.empty(4, dtype=torch.int32)
    constant_kernel[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert out.tolist() == [60, 7, 2, 1]


@triton.jit
def mask_kernel(out, limit, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = (offsets < 5) & (tl.program_id(0) < limit)
    tl.store(out + tl.program_id(0) * BLOCK + offsets, offsets, mask=mask)


def test_a_comparison_of_numbers_is_part_of_a_mask():
    out = torch.full((2, 8), -1, dtype=torch.int32)
    mask_kernel[(2,)](out, 1, BLOCK=8)
    assert out.tolist() == [[0, 1, 2, 3, 4, -1, -1, -1], [-1] * 8]


@triton.jit
def assembly_kernel(x, out, TEXT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    result = tl.inline_asm_elementwise(TEXT, "=r,r", [value], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out + offsets, result)


def test_inline_assembly_runs_its_model_or_is_refused():
    @model_of("popc.b32  $0, $1;")
    def popc(x):
        return (np.array([bin(int(v) & 0xFFFFFFFF).count("1") for v in x], np.int32),)

    x = torch.tensor([0, 7, -1, 1024], dtype=torch.int32)
    out = torch.empty(4, dtype=torch.int32)
    assembly_kernel[(1,)](x, out, TEXT="popc.b32 $0, $1;", BLOCK=4)
    assert out.tolist() == [0, 3, 32, 1]
    with pytest.raises(Exception, match=r"no model of the inline assembly: brev.b32"):
        assembly_kernel[(1,)](x, out, TEXT="brev.b32 $0, $1;", BLOCK=4)


def test_ptx_is_emulated_instruction_by_instruction():
    words = np.array([0x12345678, 0xFFFFFFFF], np.uint32)
    # Bytes 0 and 3 of the word and twice byte 0 of the constant; then (word & mask) | low byte.
    text = "prmt.b32 $0, $2, 0xab, 0x4403; and.b32 t, $2, 0xff; lop3.b32 $1, $2, 0xff00, t, 0xea;"
    permuted, merged = emulate(text, outputs=2)(words)
    assert [hex(word) for word in permuted] == ["0xabab7812", "0xababffff"]
    assert [hex(word) for word in merged] == ["0x5678", "0xffff"]
    halves = "mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high;"
    low, high = emulate(halves, outputs=2)(np.array([0xC0003C00], np.uint32))
    assert (low.tolist(), high.tolist()) == ([1.0], [-2.0])
    for refused in ("brev.b32 $0, $1;", "prmt.b32 $0, $1, 0, 0x8000;"):
        with pytest.raises(NotImplementedError):
            emulate(refused, outputs=1)(words)


@triton.jit
def described_kernel(x, out, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    index = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + index, x.load([row, 16]))


def test_descriptors_read_e4m3_and_zeros_past_the_ends():
    codes = ALL_E4M3.view(torch.uint8).reshape(4, 64)[:, :40].view(torch.float8_e4m3fn)
    out = torch.empty(4, 32, dtype=torch.float8_e4m3fn)
    described = TensorDescriptor.from_tensor(codes, [4, 32])
    described_kernel[(1,)](described, out, 2, ROWS=4, COLUMNS=32)
    expected = torch.zeros(4, 32, dtype=torch.uint8)
    expected[:2, :24] = codes.view(torch.uint8)[2:, 16:]
    assert_same_bits(out.view(torch.uint8), expected)


def test_encode_and_decode_invert_each_other():
    codes = np.arange(256, dtype=np.uint8)
    numbers = codes[~np.isnan(decode(codes, "fp8e4nv"))]
    assert np.array_equal(encode(decode(numbers, "fp8e4nv"), "fp8e4nv"), numbers)
