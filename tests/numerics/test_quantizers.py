"""The quantizers' contract: order of operations, ties, saturation, zeros, tiny blocks, NaN."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mokernels import numerics
from mokernels.errors import ArgumentError

F32 = np.float32


def floats(shape):
    """fp32 arrays of any magnitude, zeros and subnormals included."""
    elements = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-10, 10, width=32)
    return hnp.arrays(F32, shape, elements=elements)


def rows(k_multiple=1, max_k=80):
    shapes = st.tuples(st.integers(1, 4), st.integers(1, max(1, max_k // k_multiple)))
    return shapes.flatmap(lambda s: floats((s[0], s[1] * k_multiple)))


def ulp_close(a, b, ulps=1):
    """Equal up to a number of fp32 ulps."""
    a, b = a.detach().numpy(), b.detach().numpy()
    return bool(np.all(np.abs(a - b) <= ulps * np.spacing(np.maximum(np.abs(a), np.abs(b)))))


@given(rows())
def test_per_token_follows_the_contract_to_the_bit(x):
    codes, scale = numerics.quantize_fp8_per_token(torch.from_numpy(x))
    for row in range(x.shape[0]):
        amax = F32(np.max(np.abs(x[row])))
        m = (F32(1) / (F32(1) if amax <= F32(2.0**-24) else amax)) * F32(448)
        expected = torch.from_numpy(np.clip(x[row] * m, F32(-448), F32(448)))
        assert torch.equal(codes[row].float(), expected.to(torch.float8_e4m3fn).float())
        assert scale[row].numpy() == F32(1) / m


def test_per_token_of_zero_and_tiny_tokens():
    x = torch.tensor([[0.0, 0.0], [2.0**-24, -(2.0**-25)], [2.0**-23, 0.0]])
    codes, scale = numerics.quantize_fp8_per_token(x)
    assert codes.float()[:2].eq(0).all()
    assert codes.float()[2].tolist() == [448.0, 0.0]
    assert torch.equal(scale[:2], torch.full((2,), 1 / 448))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_poisons_its_token_and_no_other(bad):
    x = torch.ones(2, 8)
    x[0, 3] = bad
    codes, scale = numerics.quantize_fp8_per_token(x)
    values = numerics.dequantize_fp8(codes, scale)
    assert values[0].isnan().all()
    assert values[1].isfinite().all()


def test_static_multiplier_is_not_the_reciprocal_of_the_scale():
    scales = torch.rand(20_000) + 1e-3
    multiplier, divisor = numerics.static_fp8_scales(scales)
    reciprocal = F32(1) / (F32(448) * scales.numpy())
    assert np.array_equal(multiplier.numpy(), reciprocal * F32(448))
    assert np.array_equal(divisor.numpy(), F32(1) / multiplier.numpy())
    assert (divisor != scales).any(), "the stored scale and 1 / m differ by an ulp somewhere"
    assert ulp_close(divisor, scales, ulps=4)


def test_the_multiplier_is_a_reciprocal_times_448_not_a_quotient():
    amax = torch.rand(20_000) + 0.1
    multiplier = numerics.fp8_multiplier(amax).numpy()
    twice_rounded = (F32(1) / amax.numpy()) * F32(448)
    assert np.array_equal(multiplier, twice_rounded)
    assert 0.1 < np.mean(multiplier != F32(448) / amax.numpy()) < 0.5


def test_static_quantization_saturates_and_keeps_nan():
    x = torch.tensor([1.0, 2.0, -5.0, float("inf"), float("nan")])
    codes = numerics.quantize_fp8(x, torch.tensor(448.0)).float()
    assert codes[:4].tolist() == [448.0, 448.0, -448.0, 448.0]
    assert codes[4].isnan()


@given(rows(max_k=300))
@settings(max_examples=40)
def test_per_block_is_per_token_of_each_block(x):
    codes, scale = numerics.quantize_fp8_per_block(torch.from_numpy(x))
    for start in range(0, x.shape[1], 128):
        part = torch.from_numpy(x[:, start : start + 128])
        part_codes, part_scale = numerics.quantize_fp8_per_token(part)
        assert torch.equal(codes[:, start : start + 128].float(), part_codes.float())
        assert torch.equal(scale[:, start // 128], part_scale)


@pytest.mark.parametrize("k", [0, 1, 127, 128, 129, 576])
def test_per_block_shapes(k):
    codes, scale = numerics.quantize_fp8_per_block(torch.ones(3, 2, k))
    assert codes.shape == (3, 2, k)
    assert scale.shape == (3, 2, -(-k // 128))


@given(rows(k_multiple=16, max_k=64), st.floats(2.0**-26, 40.0, width=32))
def test_nvfp4_follows_the_contract_to_the_bit(x, g):
    g = F32(g)
    codes, scale = numerics.quantize_nvfp4(torch.from_numpy(x), torch.tensor(g))
    nibbles = numerics.unpack_nibbles(codes)
    for row in range(x.shape[0]):
        for block in range(x.shape[1] // 16):
            values = x[row, block * 16 : block * 16 + 16]
            with np.errstate(over="ignore"):
                ratio = min(F32(np.max(np.abs(values)) / (F32(6) * g)), F32(448))
            stored = torch.tensor(ratio).to(torch.float8_e4m3fn).float().numpy()
            step = F32(stored * g)
            tiny = step < F32(1e-5)
            assert scale[row, block].float().item() == (0 if tiny else stored)
            quotient = torch.from_numpy(values / (F32(1) if tiny else step))
            expected = torch.zeros(16) if tiny else numerics.encode_e2m1(quotient)
            got = nibbles[row, block * 16 : block * 16 + 16]
            assert torch.equal(got.float(), expected.float())


def test_nvfp4_never_drops_a_code_that_modelopt_keeps():
    """Below the accepted global scale, ModelOpt's own division by 1 gives zeros as well."""
    g = torch.tensor(42.0)
    largest_flushed = 6 * 42.0 * 2.0**-10  # the largest amax whose block scale rounds to zero
    x = torch.full((1, 16), largest_flushed)
    codes, scale = numerics.quantize_nvfp4(x, g)
    assert scale.float().item() == 0
    assert numerics.encode_e2m1(x).eq(0).all(), "dividing by 1, as ModelOpt does, gives zeros too"
    assert codes.eq(0).all()


def test_nvfp4_saturates_and_keeps_nan_in_the_block_scale():
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16], x[0, 32] = 1e6, float("nan"), 1.0
    g = torch.tensor(1.0 / (6 * 448))
    values = numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(x, g), g)
    assert values[0, 0] == 6 * (448 * g)
    assert values[0, 16:32].isnan().all()
    assert values[0, 32:].isfinite().all()


def test_nvfp4_global_scale_that_is_not_positive_counts_as_tiny():
    x = torch.ones(1, 16)
    for g in (0.0, -1.0):
        codes, scale = numerics.quantize_nvfp4(x, torch.tensor(g))
        # 448 * 1e-12 is below the tiny-block threshold
        assert scale.float().item() == 0
        assert codes.eq(0).all()


@given(rows(k_multiple=32, max_k=96))
def test_mxfp8_exponent_is_the_smallest_that_fits(x):
    codes, exponents = numerics.quantize_mxfp8(torch.from_numpy(x))
    for row in range(x.shape[0]):
        for block in range(x.shape[1] // 32):
            values = x[row, block * 32 : block * 32 + 32]
            exponent = int(exponents[row, block]) - 127
            amax = F32(np.max(np.abs(values)))
            if amax == 0:
                assert exponent == 0
                continue
            ratio = float(F32(amax / F32(448)))  # the quotient that is rounded up to a power of two
            assert ratio <= 2.0**exponent
            assert exponent == -127 or ratio > 2.0 ** (exponent - 1)
            expected = torch.from_numpy(values.astype(np.float64) * 2.0**-exponent).float()
            got = codes[row, block * 32 : block * 32 + 32]
            assert torch.equal(got.float(), expected.clamp(-448, 448).to(got.dtype).float())


def test_mxfp8_special_blocks():
    x = torch.zeros(4, 32)
    x[1, 0], x[2, 0], x[3, 0] = float("nan"), float("inf"), 448.0
    codes, exponents = numerics.quantize_mxfp8(x)
    assert exponents.flatten().tolist() == [127, 127, 127, 127]
    assert codes[1, 0].float().isnan()
    assert codes[1, 1:].float().eq(0).all()
    assert codes[2, 0].float() == 448
    weight_exponents = numerics.quantize_mxfp8_weight(x[[0, 3]])[1]
    assert weight_exponents.flatten().tolist() == [0, 127], (
        "ModelOpt exports zero blocks as 2**-127"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 128), (2, 3, 160), (32,), (0, 64)])
def test_round_trips_are_idempotent(dtype, shape):
    """Quantizing a dequantized tensor again changes nothing: the codes are a fixed point."""
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype)
    g = torch.tensor(10.0 / (6 * 448))
    trips = {
        "per_token": lambda v: numerics.dequantize_fp8(*numerics.quantize_fp8_per_token(v)),
        "per_block": lambda v: numerics.dequantize_fp8(*numerics.quantize_fp8_per_block(v)),
        "mxfp8": lambda v: numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(v)),
        "nvfp4": lambda v: numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(v, g), g),
    }
    for name, trip in trips.items():
        once = trip(x)
        assert once.shape == x.shape, name
        twice = trip(once)
        # The scale of the second pass may differ from the first by an ulp (1 / (448 / amax)).
        assert torch.allclose(twice, once, rtol=1e-6, atol=0), name
        worst = {"nvfp4": 0.3, "mxfp8": 0.07}.get(name, 0.07)
        if x.numel():
            assert (once - x.float()).norm() <= worst * x.float().norm(), name


def test_fp8_tensor_weight_rounds_twice_as_modelopt_does():
    torch.manual_seed(1)
    weight = torch.randn(64, 96, dtype=torch.bfloat16)
    codes, scale = numerics.quantize_fp8_tensor_weight(weight)
    assert scale == weight.abs().max().float() / 448
    quotient = (weight.float() / scale).to(torch.bfloat16)
    assert torch.equal(codes.float(), quotient.to(torch.float8_e4m3fn).float())
    once = (weight.float() / scale).to(torch.float8_e4m3fn)
    share = (once.float() != codes.float()).float().mean()
    assert 0.005 < share < 0.1, "a bf16 quotient moves a few percent of the codes"


def test_fp8_channel_weight_keeps_an_all_zero_row():
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0]])
    codes, scale = numerics.quantize_fp8_channel_weight(weight)
    assert scale.tolist() == [F32(2.0) / F32(448), 1.0]
    assert codes.float()[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 100), (128, 128), (129, 128), (300, 576)])
def test_fp8_block_weight_pads_short_blocks(n, k):
    torch.manual_seed(2)
    weight = torch.randn(n, k, dtype=torch.bfloat16)
    codes, scale = numerics.quantize_fp8_block_weight(weight)
    rows_, columns = -(-n // 128), -(-k // 128)
    assert scale.shape == (() if rows_ * columns == 1 else (rows_, 1, columns, 1))
    assert codes.shape == (n, k)
    grid = scale.reshape(rows_, columns)
    for i in range(rows_):
        for j in range(columns):
            block = weight[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].float()
            assert grid[i, j] == block.abs().max() / 448
            expected = (block / grid[i, j]).to(torch.float8_e4m3fn).float()
            got = codes[128 * i : 128 * i + 128, 128 * j : 128 * j + 128].float()
            assert torch.equal(got, expected)


def test_nvfp4_weight_blocks():
    torch.manual_seed(3)
    weight = torch.randn(8, 64, dtype=torch.bfloat16)
    weight[0, :16] = 0
    codes, scale, g = numerics.quantize_nvfp4_weight(weight)
    assert g == weight.abs().max().float() / (6 * 448)
    assert scale[0, 0].float() == 1.0, "ModelOpt gives an all-zero block the scale 1"
    values = numerics.dequantize_nvfp4(codes, scale, g)
    assert (values - weight.float()).norm() < 0.12 * weight.float().norm()


def test_nvfp4_weight_shared_scale_and_zero_weight():
    weight = torch.eye(16)
    shared = torch.tensor(0.5)
    assert numerics.quantize_nvfp4_weight(weight, shared)[2] == shared
    codes, scale, g = numerics.quantize_nvfp4_weight(torch.zeros(2, 16))
    assert numerics.dequantize_nvfp4(codes, scale, g).eq(0).all()


@pytest.mark.parametrize(
    ("quantize", "name", "multiple"),
    [
        (lambda x: numerics.quantize_nvfp4(x, torch.tensor(1.0)), "NVFP4", 16),
        (numerics.quantize_nvfp4_weight, "NVFP4", 16),
        (numerics.quantize_mxfp8, "MXFP8", 32),
        (numerics.quantize_mxfp8_weight, "MXFP8", 32),
    ],
)
def test_a_last_dimension_of_broken_blocks_is_refused(quantize, name, multiple):
    with pytest.raises(ArgumentError, match=f"{name} needs .* multiple of {multiple}.*leave this"):
        quantize(torch.ones(2, 24 if multiple == 16 else 48))


@pytest.mark.parametrize(
    ("rows_", "k", "shape"),
    [
        (4, 300, ()),
        (4, 300, (1,)),
        (4, 300, (4,)),
        (4, 300, (4, 3)),
        (300, 260, (3, 3)),
        (300, 260, (3, 1, 3, 1)),
    ],
)
def test_expand_fp8_scale_reaches_every_element(rows_, k, shape):
    scale = torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float32).reshape(shape)
    full = numerics.expand_fp8_scale(scale, rows_, k).expand(rows_, k)
    for row in (0, rows_ - 1):
        for column in (0, k - 1):
            if scale.numel() == 1:
                expected = scale.item()
            elif scale.dim() == 1:
                expected = scale[row].item()
            else:
                flat = scale.reshape(scale.shape[0], -1)
                by_row = row if flat.shape[0] == rows_ else row // 128
                expected = flat[by_row, column // 128].item()
            assert full[row, column] == expected


def test_expand_fp8_scale_refuses_other_shapes():
    with pytest.raises(ArgumentError, match=r"shape \(5,\) fits no granularity.*\[4, 300\]"):
        numerics.expand_fp8_scale(torch.ones(5), 4, 300)
