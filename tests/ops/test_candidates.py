"""What tuning may choose from: legal, few, and adding in the closed form's order."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mokernels.ops.candidates import (
    MOST_CANDIDATES,
    candidates_of,
    instruction_rows,
    objection,
)
from mokernels.ops.config_limits import config_ok, narrowed
from mokernels.ops.configs import M_BUCKETS, Kind, all_configs, choose
from mokernels.ops.gemm_config import DECODED_FIRST, GemmConfig
from mokernels.ops.kinds import GEMVS
from mokernels.ops.target import SM_80, SM_90, SM_100
from tests.ops.test_configs import ANY_M, CHOICES, MATRIX_CHOICES, name

BUCKETS = (*M_BUCKETS, ANY_M)


def cases(kind, target):
    for rows in BUCKETS:
        for n, k in ((4096, 4096), (28672, 4096), (1024, 14336)):
            base = choose(kind, rows, n, k, target)
            yield base, candidates_of(base, kind, target)


@pytest.mark.parametrize(("target", "kind"), CHOICES, ids=name)
def test_candidates_add_in_one_order(target, kind):
    for base, found in cases(kind, target):
        assert found[0] == base
        assert {config.order for config in found} == {base.order}
        assert {config.swap for config in found if config.tma == base.tma} == {base.swap}
        assert not any(config.swap for config in found if config.tma)
        assert {instruction_rows(c, kind, target) for c in found} == {
            instruction_rows(base, kind, target)
        }


@pytest.mark.parametrize(("target", "kind"), CHOICES, ids=name)
def test_candidates_are_legal_distinct_and_few(target, kind):
    for _, found in cases(kind, target):
        assert all(config_ok(config, kind, target) for config in found)
        assert len(set(found)) == len(found) <= MOST_CANDIDATES


@pytest.mark.parametrize(("target", "kind"), MATRIX_CHOICES, ids=name)
def test_there_is_something_to_try(target, kind):
    # A target whose shared memory one tile fills has less of it.
    assert max(len(found) for _, found in cases(kind, target)) >= 6


@pytest.mark.parametrize("kind", GEMVS, ids=name)
def test_nothing_varies_in_a_gemv(kind):
    base = choose(kind, 1, 28672, 4096, SM_90)
    assert candidates_of(base, kind, SM_90) == (base,)
    wider = replace(base, block_n=8)
    assert "in an order that its tile and warps decide" in objection(wider, base, kind, SM_90)


BASE = choose(Kind.FP8, 256, 4096, 4096, SM_90)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"split_k": BASE.split_k + 1}, "its split_k is"),
        ({"block_k": 256}, "its block_k is 256 and the closed form's is 128, so it adds otherwise"),
        ({"promote": None}, "its promote is None"),
        ({"swap": True}, "its swap is True"),
        ({"serial": True}, "its serial is True"),
        ({"block_m": 96}, "does not fit sm_90"),
        ({"num_stages": 0}, "does not fit"),
        ({"num_stages": 12}, "does not fit"),
        ({"num_warps": 3}, "does not fit"),
        ({"group_m": 10**6}, "does not fit"),
        ({"block_m": "128"}, "does not fit"),
        ({"block_n": None}, "does not fit"),
        ({"num_warps": True}, "does not fit"),
        ({"block_m": 32}, "another matrix instruction"),
        ({"num_warps": 2}, "another matrix instruction"),
        ({"block_m": 64, "num_warps": 8}, "another matrix instruction"),
    ],
    ids=str,
)
def test_objections_say_why(change, reason):
    assert objection(BASE, BASE, Kind.FP8, SM_90) is None
    assert reason in objection(replace(BASE, **change), BASE, Kind.FP8, SM_90)


@pytest.mark.parametrize(
    ("target", "first", "second", "same"),
    [
        # wgmma has 64 rows of M; of fewer Triton makes an instruction for 16 bits.
        (SM_90, GemmConfig(64, 64, 128, 4, 3), GemmConfig(128, 64, 128, 8, 3), True),
        (SM_90, GemmConfig(64, 64, 128, 4, 3), GemmConfig(32, 64, 128, 4, 3), False),
        (SM_90, GemmConfig(16, 64, 128, 4, 3, True), GemmConfig(16, 128, 128, 4, 3, True), True),
        (SM_90, GemmConfig(16, 64, 128, 4, 3, True), GemmConfig(16, 32, 128, 4, 3, True), False),
        (SM_100, GemmConfig(64, 64, 128, 4, 3), GemmConfig(128, 64, 128, 4, 3), False),
        (SM_100, GemmConfig(256, 64, 128, 4, 3), GemmConfig(128, 64, 128, 8, 3), True),
        (SM_80, GemmConfig(16, 16, 128, 1, 3), GemmConfig(128, 128, 128, 8, 3), True),
    ],
)
def test_instructions(target, first, second, same):
    found = [instruction_rows(config, Kind.HALF_FP8, target) for config in (first, second)]
    assert (found[0] == found[1]) == same


def test_codes_may_come_by_tma_instead():
    tiles = {"tma": True, "swap": False, "block_m": 64, "block_n": 128, "num_warps": 4}
    for kind, n in product((Kind.FP8, Kind.FP8_BLOCK), (4096, 28672)):  # split, and whole
        base = choose(kind, 64, n, 4096, SM_90)
        assert (base.split_k > 1) == (n == 4096)
        assert base.swap
        assert not base.tma
        assert replace(base, **tiles) in candidates_of(base, kind, SM_90)
    for kind, rows, n, change, reason in (
        # A program that quantizes its own rows does not have them in memory for TMA.
        (Kind.FP8, 32, 28672, {}, "its swap is False"),
        (Kind.HALF_FP8, 64, 28672, {}, "its swap is False"),
        (Kind.FP8, 64, 28672, {"tma": "yes"}, "its swap is False"),
        (Kind.FP8, 64, 28672, {"swap": True}, "its swap is True"),
    ):
        base = choose(kind, rows, n, 4096, SM_90)
        base = replace(base, swap=not change.get("swap", False))
        found = objection(replace(base, **{**tiles, **change}), base, kind, SM_90)
        assert reason in found, (kind, rows, n, change)
        by_tma = [c for c in candidates_of(base, kind, SM_90) if c.tma]
        assert bool(by_tma) == bool(change)


def test_amd_multiplies_small_sides_by_another_instruction():
    (gfx942,) = (t for t, _ in CHOICES if t.name == "gfx942" and _ is Kind.HALF_FP8)
    small, large = GemmConfig(16, 64, 64, 4, 2), GemmConfig(32, 64, 64, 4, 2)
    assert instruction_rows(small, Kind.HALF_FP8, gfx942) == 16
    assert instruction_rows(large, Kind.HALF_FP8, gfx942) == 32


@given(st.sampled_from(MATRIX_CHOICES), st.integers(1, 5000), st.integers(1, 40_000))
def test_few_rows_stay_in_one_tile(choice, m, n):
    target, kind = choice
    base = choose(kind, m, n, 4096, target)
    if base.block_m <= 64:
        assert {c.block_m for c in candidates_of(base, kind, target)} == {base.block_m}


def test_by_tma_tiles_of_half_the_width_fit_too():
    base = choose(Kind.FP8_FAST, 4096, 28672, 4096, SM_90)
    assert base.tma
    assert base.block_n == 256
    wide = [c for c in candidates_of(base, Kind.FP8_FAST, SM_90) if c.block_n > 128]
    assert len(wide) > 1
    assert all(config_ok(narrowed(c), Kind.FP8_FAST, SM_90) for c in wide)


def test_what_is_decoded_first_is_tried_in_both_wide_tiles():
    for kind in DECODED_FIRST:
        found = candidates_of(choose(kind, 2048, 28672, 4096, SM_90), kind, SM_90)
        tiles = {(c.block_m, c.block_n, c.num_warps, c.num_stages) for c in found}
        assert {(128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 3), (256, 128, 8, 4)} <= tiles
        assert any(c.block_m == c.block_n == 128 for c in found)


def test_every_choice_of_a_table_is_its_own_candidate():
    for target, kind in CHOICES:
        for config in all_configs(target)[kind]:
            assert objection(config, config, kind, target) is None
            assert kind in GEMVS or instruction_rows(config, kind, target) > 0
