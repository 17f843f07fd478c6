"""Which products quantize their activations themselves, and which are GEMVs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mokernels.ops.configs import M_BUCKETS, Kind, choose
from mokernels.ops.quantizing import (
    E4M3_WEIGHTS_WORTH_A_GEMV,
    STATIC_ROWS_IN_GEMM,
    TOKEN_K_IN_GEMM,
    TOKEN_ROWS_IN_GEMM,
    WEIGHTS_WORTH_A_LAUNCH,
    Activations,
    multiplies_row_by_e4m3_gemv,
    multiplies_row_by_gemv,
    quantizes_in_gemm,
)
from mokernels.ops.target import (
    CUDA_TARGETS,
    GFX942,
    GFX950,
    HIP_TARGETS,
    SM_80,
    SM_89,
    SM_90,
    SM_100,
    SM_120,
    Target,
)

BF16, FP32 = 2, 4  # bytes of an element
K = 4096


def answer(
    target: Target, how: Activations, m: int, k: int = K, x_bytes: int = BF16, n: int = 4096
) -> bool:
    config = choose(Kind.FP8, m, n, k, target)
    return quantizes_in_gemm(how, m, k, x_bytes, config, target)


@pytest.mark.parametrize("target", [SM_89, SM_90, SM_100, SM_120, GFX950], ids=lambda t: t.name)
def test_few_rows_are_quantized_in_the_gemm(target):
    assert [m for m in range(1, 100) if answer(target, "static", m)] == [*range(1, 33)]
    assert [m for m in range(1, 100) if answer(target, "token", m, k=1024)] == [*range(1, 17)]


def test_long_rows_are_not_read_twice_by_every_program():
    assert answer(SM_90, "token", 1, TOKEN_K_IN_GEMM)
    assert not answer(SM_90, "token", 1, TOKEN_K_IN_GEMM + 1)
    assert answer(SM_90, "static", 1, TOKEN_K_IN_GEMM + 1)


def test_fp32_activations_that_do_not_fit_are_quantized_before():
    small = replace(SM_120, shared_memory=64 * 1024)
    assert answer(SM_120, "static", 32, x_bytes=FP32)
    assert not answer(small, "static", 32, x_bytes=FP32)
    assert answer(small, "static", 16)


@pytest.mark.parametrize("target", [SM_80, GFX942], ids=lambda target: target.name)
def test_without_an_fp8_instruction_none_are(target):
    assert not answer(target, "static", 1)
    assert not answer(target, "token", 1)


@given(
    st.sampled_from([*CUDA_TARGETS, *HIP_TARGETS]),
    st.sampled_from(["static", "token"]),
    st.integers(1, 600),
    st.integers(1, 20_000),
    st.sampled_from([BF16, FP32]),
    st.integers(1, 40_000),
)
def test_only_the_bucket_of_rows_matters_and_no_columns(target, how, m, k, x_bytes, n):
    end = next((end for end in M_BUCKETS if m <= end), 10_000)
    assert answer(target, how, m, k, x_bytes, n) == answer(target, how, end, k, x_bytes, 64)


def test_limits_are_ends_of_buckets():
    limits = {STATIC_ROWS_IN_GEMM, TOKEN_ROWS_IN_GEMM}
    assert limits <= set(M_BUCKETS)


@pytest.mark.parametrize("target", [*CUDA_TARGETS, *HIP_TARGETS], ids=lambda target: target.name)
@pytest.mark.parametrize("kind", [Kind.FP8, Kind.FP8_BLOCK])
def test_what_quantizes_in_the_gemm_has_no_serial_parts(target, kind):
    # gemm_quantizing has no loop over parts.
    for m in (1, 16, 32, 64, 65, 128, 1024):
        config = choose(kind, m, 4096, K, target, invariant=True)
        for how in ("static", "token", "block"):
            fits = quantizes_in_gemm(how, m, K, BF16, config, target)
            assert not (fits and config.split == "serial"), (m, how)


def test_one_row_by_any_weight_is_a_gemv_unless_it_is_quantized():
    assert multiplies_row_by_gemv(1, 64, K, quantized=False)
    assert not multiplies_row_by_gemv(2, 64, K, quantized=False)
    assert not multiplies_row_by_gemv(1, 64, K + 16, quantized=False)


def test_a_quantized_row_is_one_where_that_is_worth_a_launch():
    least = WEIGHTS_WORTH_A_LAUNCH // K
    answers = [multiplies_row_by_gemv(1, n, K, quantized=True) for n in (least - 1, least, 28672)]
    assert answers == [False, True, True]


def test_one_row_by_a_large_e4m3_weight_is_a_gemv():
    least = E4M3_WEIGHTS_WORTH_A_GEMV // K
    assert E4M3_WEIGHTS_WORTH_A_GEMV == 12_582_912 == least * K
    answers = [multiplies_row_by_e4m3_gemv(1, n, K) for n in (least - 1, least, 28672)]
    assert answers == [False, True, True]
    assert not multiplies_row_by_e4m3_gemv(2, 28672, K)
    assert multiplies_row_by_e4m3_gemv(1, 28672, K + 16)
    assert not multiplies_row_by_e4m3_gemv(1, 28672, K + 8)
