"""The choice of GEMM configurations: pure, bounded, and with a fixed order of addition."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mokernels.ops.candidates import instruction_rows
from mokernels.ops.config_limits import config_ok, narrowed, shared_bytes
from mokernels.ops.configs import (
    ANY_M,
    BLOCKS_PER_SPLIT,
    M_BUCKETS,
    PARALLEL_ROWS,
    SPLITS,
    GemmConfig,
    Kind,
    all_configs,
    bucket,
    choose,
    choose_without_tma,
    kind_of_fp8,
)
from mokernels.ops.gemm_config import DECODED_FIRST, LAST_PROGRAM_BYTES, decodes_first
from mokernels.ops.kinds import GEMVS
from mokernels.ops.target import (
    CUDA_TARGETS,
    HIP_TARGETS,
    SM_80,
    SM_89,
    SM_90,
    SM_100,
    SM_120,
    Target,
)

TARGETS = (*CUDA_TARGETS, *HIP_TARGETS, Target("xpu", "xpu", 128, 64 * 1024))
CHOICES = [(target, kind) for target in TARGETS for kind in all_configs(target)]
BY_WARPS = (SM_90, Kind.HALF_NVFP4)
"""Where few rows are multiplied by an instruction that only one warp takes part in."""
MATRIX_CHOICES = [choice for choice in CHOICES if choice[1] not in GEMVS]

targets_and_kinds = st.sampled_from(CHOICES)
rows = st.integers(0, 3000) | st.sampled_from([*M_BUCKETS, *(end + 1 for end in M_BUCKETS)])
columns = st.integers(1, 40_000)
inner = st.integers(0, 30_000)
processors = st.integers(1, 400)


def name(value: object) -> str:
    return value.name if isinstance(value, Target) else getattr(value, "value", str(value))


@pytest.mark.parametrize(("target", "kind"), CHOICES, ids=name)
def test_every_configuration_is_legal(target, kind):
    for config in all_configs(target)[kind]:
        assert config_ok(config, kind, target), config
        assert config.split_k == 1


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_there_are_few_configurations(target):
    # Every one of them is compiled and tuned for; 45 is what a test run can afford. GEMVs have one
    # each, of which nothing may vary.
    found = all_configs(target)
    assert 10 <= sum(len(found[kind]) for kind in found if kind not in GEMVS) <= 45


@given(targets_and_kinds, rows, columns, inner, processors)
def test_a_choice_is_among_all_configs(choice, m, n, k, count):
    target, kind = choice
    config = choose(kind, m, n, k, replace(target, processors=count))
    assert replace(config, split_k=1) in all_configs(target)[kind]
    assert 1 <= config.split_k <= max(SPLITS)


@given(targets_and_kinds, rows, columns, inner, processors)
def test_partial_sums_cover_k_and_none_is_empty(choice, m, n, k, count):
    target, kind = choice
    config = choose(kind, m, n, k, replace(target, processors=count))
    step = config.blocks_per_split(k) * config.block_k
    assert step * config.split_k >= k
    assert step * (config.split_k - 1) < k or config.split_k == 1


@given(targets_and_kinds, rows, columns, inner, processors)
def test_a_partial_sum_is_worth_a_launch(choice, m, n, k, count):
    target, kind = choice
    config = choose(kind, m, n, k, replace(target, processors=count))
    assert config.split_k == 1 or config.blocks_per_split(k) >= BLOCKS_PER_SPLIT


@given(targets_and_kinds, rows, columns, inner)
def test_all_rows_of_a_bucket_share_the_choice(choice, m, n, k):
    target, kind = choice
    end = bucket(m)
    assert choose(kind, m, n, k, target) == choose(kind, end, n, k, target)
    assert m <= end


@given(targets_and_kinds, rows, rows, columns, inner)
def test_only_the_split_depends_on_the_rows(choice, m, other, n, k):
    target, kind = choice
    first, second = (choose(kind, value, n, k, target) for value in (m, other))
    decoded = [decodes_first(config, kind) for config in (first, second)]
    if decoded[0] == decoded[1]:
        assert replace(first, split_k=1).order == replace(second, split_k=1).order


@given(targets_and_kinds, rows, columns, columns, inner)
def test_a_member_of_a_group_adds_as_the_group_does(choice, m, group_n, member_n, k):
    target, kind = choice
    group = choose(kind, m, group_n, k, target)
    member = choose(kind, m, min(member_n, group_n), k, target, plan_n=group_n)
    assert member == group


@given(st.sampled_from(MATRIX_CHOICES), columns, inner)
def test_many_rows_do_not_split(choice, n, k):
    target, kind = choice
    assert choose(kind, M_BUCKETS[-1] + 1, n, k, target).split_k == 1


def test_few_rows_split_until_the_processors_are_filled():
    # 64 tiles of 64 columns on 132 processors: four parts make 256 programs, two on most.
    config = choose(Kind.FP8, 1, 4096, 4096, SM_90)
    assert (config.block_n, config.split_k) == (64, 4)
    assert choose(Kind.FP8, 1, 28672, 4096, SM_90).split_k == 1
    # Too few blocks of K for another part: 8 blocks are two parts of 4.
    assert choose(Kind.FP8, 1, 1024, 1024, SM_90).split_k == 2


def test_the_last_program_adds_few_parts_of_small_tiles():
    # 4 parts of 16 x 64 sums take 16 KiB; 8 of 64 x 128 would keep one processor busy for long.
    few = choose(Kind.FP8, 1, 4096, 4096, SM_90)
    many = choose(Kind.FP8, 64, 4096, 14336, SM_90)
    assert (few.split_k, few.split) == (4, "last")
    assert (many.split_k, many.split) == (8, "parts")
    at_the_limit = GemmConfig(32, 128, 128, 4, 4, split_k=8)
    assert LAST_PROGRAM_BYTES == 4 * 8 * 32 * 128
    assert at_the_limit.split == "last"
    assert replace(at_the_limit, block_m=64).split == "parts"
    assert replace(at_the_limit, num_warps=2).split == "parts"
    assert replace(at_the_limit, block_m=64, serial=True).split == "serial"
    assert replace(at_the_limit, split_k=1).split is None


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_where_a_release_may_not_cover_other_threads_a_second_launch_adds(target):
    splits = {choose(kind, 1, 1024, 16384, target).split for kind in all_configs(target)}
    assert splits == {"last" if target.backend == "cuda" else "parts"}


def test_no_partial_sum_is_left_over():
    # 33 blocks in 8 parts of ceil(33 / 8) = 5 fill only 7 of them.
    assert choose(Kind.FP8, 1, 1024, 33 * 128, SM_90).split_k == 7
    assert choose(Kind.FP8, 1, 1024, 33 * 128, SM_90).blocks_per_split(33 * 128) == 5


@pytest.mark.parametrize("target", [SM_90, SM_100], ids=name)
def test_few_rows_are_the_n_side_where_the_m_side_has_64(target):
    for kind in all_configs(target):
        config = choose(kind, 1, 4096, 4096, target, invariant=True)
        assert config.swap == (kind not in (Kind.FP32, *GEMVS)), kind


def test_few_rows_by_nvfp4_are_multiplied_by_single_warps_on_hopper():
    target, kind = BY_WARPS
    for m in EVERY_BUCKET:
        usual = choose(kind, m, 28672, 4096, target)
        invariant = choose(kind, m, 28672, 4096, target, invariant=True)
        by_warps = instruction_rows(usual, kind, target) == 16
        assert by_warps == (m <= 32)
        assert instruction_rows(invariant, kind, target) == 64


@pytest.mark.parametrize("target", [SM_80, SM_89, SM_120, *HIP_TARGETS], ids=name)
def test_elsewhere_rows_are_the_m_side(target):
    assert not any(config.swap for row in all_configs(target).values() for config in row)


def test_only_hopper_promotes_and_only_without_fast_accumulation():
    for target in TARGETS:
        for kind, row in all_configs(target).items():
            wanted = 128 if target is SM_90 and kind is Kind.FP8 else None
            assert {config.promote for config in row} == {wanted}, (target.name, kind)


@pytest.mark.parametrize(
    ("target", "block_scales", "fast", "kind"),
    [
        (SM_90, False, False, Kind.FP8),
        (SM_90, False, True, Kind.FP8_FAST),
        (SM_90, True, True, Kind.FP8_BLOCK),
        (SM_89, False, True, Kind.FP8),
        (SM_100, True, False, Kind.FP8_BLOCK),
    ],
)
def test_kind_of_an_fp8_product(target, block_scales, fast, kind):
    assert kind_of_fp8(target, block_scales, fast) is kind


def test_block_scaled_kinds_exist_where_the_matrix_units_have_them():
    for target in TARGETS:
        assert (Kind.NVFP4 in all_configs(target)) == target.has_nvfp4_dot
        assert (Kind.MXFP8 in all_configs(target)) == target.has_mxfp8_dot


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"block_m": 96}, Kind.FP8),
        ({"num_stages": 40}, Kind.FP8),
        ({"promote": 128, "block_k": 64}, Kind.FP8),
        ({"block_n": 256}, Kind.FP8_BLOCK),
        ({"block_k": 256}, Kind.HALF_BLOCK),
        ({"tma": True}, Kind.HALF_FP8),
        ({"tma": True, "swap": True}, Kind.FP8),
        ({"tma": True, "split_k": 2, "serial": True}, Kind.FP8),
        ({"tma": True, "split_k": 2, "block_k": 64}, Kind.HALF_NVFP4),
        ({"tma": True, "block_k": 512, "num_stages": 1}, Kind.FP8),
    ],
    ids=str,
)
def test_illegal_configurations_are_found(change, kind):
    legal = GemmConfig(64, 128, 128, 4, 3)
    assert config_ok(legal, kind, SM_90)
    assert not config_ok(replace(legal, **change), kind, SM_90)


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_tma_is_legal_where_it_exists(target):
    config = GemmConfig(64, 128, 128, 4, 2, tma=True)
    assert config_ok(config, Kind.FP8, target) == target.has_tma
    assert target.has_tma == (target in (SM_90, SM_100, SM_120))


@pytest.mark.parametrize("kind", GEMVS, ids=name)
@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_a_gemv_has_one_configuration(target, kind):
    # Its threads' sums are added at the end: another tile or number of warps is another order.
    (config,) = all_configs(target)[kind]
    for change in ({"num_warps": 4}, {"block_k": 4096}, {"block_m": 16}):
        assert not config_ok(replace(config, **change), kind, target)


@pytest.mark.parametrize("target", TARGETS, ids=name)
def test_gemvs_of_all_devices_have_one_tile(target):
    tiles = {kind: all_configs(target)[kind][0] for kind in GEMVS}
    assert {(c.block_m, c.block_n, c.block_k) for k, c in tiles.items() if k in E4M3_GEMVS} == {
        (1, 4, 1024)
    }
    threads = {config.num_warps for config in tiles.values()}
    assert threads == {2 if target.backend == "cuda" else 1}
    # Its rows share the scales of 128x128 blocks.
    wide = replace(tiles[Kind.GEMV_BLOCK], block_n=256)
    assert not config_ok(wide, Kind.GEMV_BLOCK, target)


E4M3_GEMVS = (Kind.GEMV_FP8, Kind.GEMV_BLOCK, Kind.GEMV_MXFP8)


def test_a_gemv_is_split_where_its_programs_are_few_and_long():
    for (n, k), split in {(28672, 4096): 1, (1024, 16384): 2, (1024, 8192): 1}.items():
        assert choose(Kind.GEMV_NVFP4, 1, n, k, SM_90).split_k == split
    for (n, k), split in {(28672, 4096): 1, (1024, 16384): 4, (4096, 4096): 1}.items():
        assert {choose(kind, 1, n, k, SM_90).split_k for kind in E4M3_GEMVS} == {split}


def test_shared_memory_is_counted_in_bytes_of_the_operands():
    config = GemmConfig(64, 128, 128, 4, num_stages=4)
    assert shared_bytes(config, Kind.FP8, SM_90) == 4 * (64 + 128) * 128 + 1024
    # mma.sync has read its operands when the next copy is issued: one buffer less.
    assert shared_bytes(config, Kind.FP8, SM_89) == 3 * (64 + 128) * 128 + 1024
    # 16-bit activations, packed codes, block scales, and the decoded weight.
    packed = 4 * (64 * 2 * 128 + 128 * 64 + 128 * 8) + 128 * 128 * 2
    assert shared_bytes(config, Kind.HALF_NVFP4, SM_90) == packed + 1024
    # A wide tile ends with its fp32 sums.
    short = GemmConfig(128, 256, 32, 8, num_stages=2)
    assert shared_bytes(short, Kind.FP8, SM_90) == 4 * 128 * 256 + 1024
    # By TMA the next tile's operands are there as well; a wide tile's 16-bit results pass in parts.
    tma = GemmConfig(128, 256, 128, 8, num_stages=3, tma=True)
    assert shared_bytes(tma, Kind.FP8, SM_90) == 3 * (128 + 256) * 128 + 2**15 + 1024
    assert shared_bytes(narrowed(tma), Kind.FP8, SM_90) == 5 * 256 * 128 + 4 * 128 * 128 + 1024
    # A weight that is decoded first has 16 bits too, and its scales are not read.
    decoded = replace(tma, block_k=64)
    assert shared_bytes(decoded, Kind.HALF_NVFP4, SM_90) == shared_bytes(tma, Kind.FP8, SM_90)


@given(st.sampled_from(MATRIX_CHOICES), rows, columns, inner, processors, st.booleans(), columns)
def test_what_takes_the_place_of_tma_adds_in_its_order(choice, m, n, k, count, invariant, plan_n):
    target, kind = replace(choice[0], processors=count), choice[1]
    config, other = (
        choice(kind, m, n, k, target, plan_n, invariant) for choice in (choose, choose_without_tma)
    )
    assert not other.tma
    if not decodes_first(config, kind):
        assert other.order == config.order
        assert other.split == config.split
    assert replace(other, split_k=1, serial=False) in all_configs(target)[kind]
    assert config == other or (config.tma and m > 256 and config.split is None)


def test_many_rows_go_by_tma_on_hopper_and_blackwell():
    kinds = {
        SM_90: (Kind.FP8, Kind.FP8_FAST, *DECODED_FIRST),
        SM_100: (Kind.FP8, Kind.NVFP4, Kind.MXFP8, *DECODED_FIRST),
    }
    for target, kind in CHOICES:
        wanted = kind in kinds.get(target, ())
        for m in (512, 2048):
            assert choose(kind, m, 28672, 4096, target).tma == wanted, (target.name, kind)
        assert not choose(kind, 256, 28672, 4096, target).tma
    # Here one row splits K, and batch invariance makes many rows do so too.
    assert choose(Kind.FP8, 2048, 1024, 4096, SM_90).tma
    assert not choose(Kind.FP8, 2048, 1024, 4096, SM_90, invariant=True).tma


@given(st.sampled_from(DECODED_FIRST), st.integers(257, 5000), columns, inner, columns)
def test_a_weight_with_tiles_enough_is_decoded_first_but_not_in_batch_invariance(
    kind, m, n, k, plan_n
):
    config = choose(kind, m, n, k, SM_90, plan_n)
    # Up to 512 rows are 4 tiles high, and 66 tiles are half as many as there are processors.
    assert decodes_first(config, kind) == (m > 512 or plan_n > 16 * 128)
    assert not config.tma or config.split is None
    invariant = choose(kind, m, n, k, SM_90, plan_n, invariant=True)
    assert not invariant.tma
    assert invariant.order == choose(kind, 1, n, k, SM_90, plan_n, invariant=True).order


def test_tiles_by_tma_are_narrowed_to_squares():
    for wide in (
        GemmConfig(128, 256, 64, 8, 4, tma=True),
        GemmConfig(256, 128, 64, 8, 3, tma=True),
    ):
        narrow = narrowed(wide)
        assert (narrow.block_m, narrow.block_n, narrow.num_stages) == (128, 128, 5)
        assert narrow.order == wide.order
        for kind in DECODED_FIRST:
            assert config_ok(wide, kind, SM_90)
            assert config_ok(narrow, kind, SM_90)


def test_buckets():
    assert [bucket(m) for m in (0, 1, 16, 17, 512, 513)] == [16, 16, 16, 32, 512, ANY_M]


EVERY_BUCKET = (1, 16, 17, 64, 65, 128, 129, 512, 513, 1024, 100_000)


@pytest.mark.parametrize(("target", "kind"), MATRIX_CHOICES, ids=name)
def test_an_invariant_order_is_that_of_one_row(target, kind):
    orders = set()
    for n in (1, 64, 1024, 4096, 14336, 128_256):
        for k in (0, 31, 512, 1024, 33 * 128, 4096, 14336):
            alone = choose(kind, 1, n, k, target, invariant=True).order
            # But where few rows have an instruction of their own, that is also the default's.
            assert (target, kind) == BY_WARPS or choose(kind, 1, n, k, target).order == alone
            batches = {choose(kind, m, n, k, target, invariant=True).order for m in EVERY_BUCKET}
            assert batches == {alone}, (n, k)
            orders |= {choose(kind, m, n, k, target).order == alone for m in EVERY_BUCKET}
    # By default some of these are added otherwise: the mode is not for nothing.
    assert orders == {True, False}


@given(st.sampled_from(MATRIX_CHOICES), rows, columns, columns, inner, processors)
def test_an_invariant_choice_changes_the_split_alone(choice, m, n, group_n, k, count):
    target, kind = choice[0], choice[1]
    target = replace(target, processors=count)
    config = choose(kind, m, n, k, target, invariant=True)
    usual = choose(kind, m, n, k, target)
    by_warps = (choice[0], kind) == BY_WARPS and m <= 32
    if decodes_first(usual, kind):
        usual = choose_without_tma(kind, m, n, k, target)
    if config.split != "serial" and not by_warps:
        assert config == replace(usual, split_k=config.split_k)
    assert replace(config, split_k=1, serial=False) in all_configs(target)[kind]
    assert (config.split == "serial") == (m > PARALLEL_ROWS and config.split_k > 1)
    assert not config.serial or config.split == "serial"
    group = choose(kind, m, group_n, k, target, invariant=True)
    assert choose(kind, m, min(n, group_n), k, target, group_n, invariant=True) == group


@given(targets_and_kinds, rows, columns, inner, processors)
def test_by_default_nothing_is_serial(choice, m, n, k, count):
    target, kind = choice
    config = choose(kind, m, n, k, replace(target, processors=count))
    assert config.split in (None, "last", "parts")
    assert (config.split is None) == (config.split_k == 1)
