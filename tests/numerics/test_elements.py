"""Encoders and decoders, exhaustively over bf16, against a search through the table of codes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mokernels import numerics
from mokernels.errors import ArgumentError
from tests.support.compare import assert_same_bits

ALL_BF16 = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
FINITE_BF16 = ALL_BF16[ALL_BF16.isfinite()]


def nearest_even_code(x: torch.Tensor, magnitudes: list[float]) -> torch.Tensor:
    """Code of the nearest magnitude for every x: ties to the even code, saturating; no NaN."""
    table = np.array(magnitudes, dtype=np.float64)
    value = x.double().abs().numpy()[:, None]
    distance = np.abs(np.minimum(value, table[-1]) - table[None, :])
    # An odd code only wins when it is strictly nearer, so a hair is added to its distance; all
    # differences between bf16 values and code values are far coarser than 1e-300.
    index = np.lexsort((np.arange(len(table)) % 2 * np.ones_like(distance), distance), axis=-1)
    return torch.from_numpy(index[:, 0].astype(np.int64))


def e4m3_magnitudes() -> list[float]:
    """The 127 finite magnitudes of E4M3 by their definition (OCP FP8 specification)."""
    subnormal = [m * 2.0**-9 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return [*subnormal, *normal][:-1]  # the last pattern is NaN


def test_e4m3_encodes_every_bf16_like_the_table():
    codes = numerics.encode_e4m3(FINITE_BF16).view(torch.uint8).long()
    expected = nearest_even_code(FINITE_BF16, e4m3_magnitudes())
    assert torch.equal(codes & 0x7F, expected)
    assert torch.equal(codes >> 7, torch.signbit(FINITE_BF16.float()).long())


@pytest.mark.parametrize(
    ("value", "code"),
    [(448.0, 448.0), (464.0, 448.0), (465.0, 448.0), (1e30, 448.0), (float("inf"), 448.0)],
)
def test_e4m3_saturates(value, code):
    both = numerics.encode_e4m3(torch.tensor([value, -value])).float()
    assert both.tolist() == [code, -code]


def test_nan_stays_nan_in_e4m3():
    nan = ALL_BF16[ALL_BF16.isnan()]
    assert numerics.encode_e4m3(nan).float().isnan().all()


def test_e4m3_decodes_every_code():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = numerics.decode_e4m3(codes)
    magnitudes = torch.tensor([*e4m3_magnitudes(), float("nan")])
    expected = torch.cat([magnitudes, -magnitudes])
    assert torch.equal(values.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
    assert torch.equal(
        numerics.decode_e4m3(codes.view(torch.float8_e4m3fn)).isnan(), values.isnan()
    )


E2M1_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_e2m1_encodes_every_bf16_like_the_table():
    codes = numerics.encode_e2m1(FINITE_BF16).long()
    assert torch.equal(codes & 7, nearest_even_code(FINITE_BF16, E2M1_MAGNITUDES))
    assert torch.equal(codes >> 3, (FINITE_BF16 < 0).long()), "only a negative value has a sign"


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        # Ties go to the even code, written out: 0, 1, 2, 4 have even codes, 0.5, 1.5, 3, 6 odd.
        (0.25, 0.0),
        (0.75, 1.0),
        (1.25, 1.0),
        (1.75, 2.0),
        (2.5, 2.0),
        (3.5, 4.0),
        (5.0, 4.0),
        (5.0001, 6.0),
        (1e9, 6.0),
        (float("inf"), 6.0),
    ],
)
def test_e2m1_ties_and_saturation(value, rounded):
    codes = numerics.encode_e2m1(torch.tensor([value, -value]))
    assert numerics.decode_e2m1(codes).tolist() == [rounded, -rounded]


def test_e2m1_zero_has_code_zero_and_tiny_negative_code_eight():
    assert numerics.encode_e2m1(torch.tensor([0.0, -0.0, -1e-9])).tolist() == [0, 0, 8]


def test_e2m1_decodes_every_code_and_ignores_the_high_nibble():
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    expected = torch.tensor([*E2M1_MAGNITUDES, *(-m for m in E2M1_MAGNITUDES)]).repeat(16)
    assert torch.equal(numerics.decode_e2m1(codes), expected)


def test_e8m0_decodes_every_exponent():
    exponents = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    values = numerics.decode_e8m0(exponents)
    assert values[255].isnan()
    expected = torch.tensor([2.0 ** (u - 127) for u in range(255)], dtype=torch.float64)
    assert torch.equal(values[:255].double(), expected)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_packing_is_undone_by_unpacking(codes):
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = numerics.pack_nibbles(tensor)
    assert packed.tolist() == [codes[i] + 16 * codes[i + 1] for i in range(0, len(codes), 2)]
    assert torch.equal(numerics.unpack_nibbles(packed), tensor)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 3, 6), (1, 2)])
def test_packing_keeps_leading_dimensions(shape):
    codes = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = numerics.pack_nibbles(codes)
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(numerics.unpack_nibbles(packed), codes)


@pytest.mark.parametrize("codes", [torch.zeros(3, dtype=torch.uint8), torch.zeros(4)])
def test_packing_refuses_what_it_cannot_pack(codes):
    with pytest.raises(ArgumentError, match="needs uint8 codes with an even last dimension, got"):
        numerics.pack_nibbles(codes)


def test_e2m1_pairs_decode_every_byte_low_nibble_first():
    packed = torch.arange(256, dtype=torch.uint8)
    expected = numerics.decode_e2m1(torch.stack([packed & 0xF, packed >> 4], dim=-1)).flatten()
    assert_same_bits(numerics.decode_e2m1_pairs(packed), expected)


@pytest.mark.parametrize("decode", [numerics.decode_e4m3, numerics.decode_e2m1_pairs])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4), (2, 3, 6)])
def test_values_go_where_they_are_wanted(decode, shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    expected = decode(codes)
    out = torch.full_like(expected, torch.nan)
    assert decode(codes, out) is out
    assert_same_bits(out, expected)


@pytest.mark.parametrize("decode", [numerics.decode_e4m3, numerics.decode_e2m1])
def test_large_tensors_decode_as_small_ones(decode):
    codes = torch.randint(0, 256, (300, 1001), dtype=torch.uint8).t()
    assert_same_bits(decode(codes), torch.stack([decode(row) for row in codes]))


def test_large_packed_weights_dequantize_as_their_rows():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (600, 512), dtype=torch.uint8, generator=generator)
    scale = torch.rand(600, 64, generator=generator).to(torch.float8_e4m3fn)
    whole = numerics.dequantize_nvfp4(codes, scale, torch.tensor(0.5))
    halves = [
        numerics.dequantize_nvfp4(codes[i::2], scale[i::2], torch.tensor(0.5)) for i in (0, 1)
    ]
    assert_same_bits(whole, torch.stack(halves, 1).flatten(0, 1))
