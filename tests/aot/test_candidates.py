"""What the compilers make of candidates: the closed form's matrix instruction, no spills."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import pytest

from mokernels.ops import tuned
from mokernels.ops.candidates import candidates_of, objection
from mokernels.ops.config_limits import shared_bytes
from mokernels.ops.configs import Kind, all_configs, bucket, choose
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.launch.plan import Launch
from mokernels.ops.table_files import Key
from mokernels.ops.target import CUDA_TARGETS, SM_90, Target
from tests.aot.test_gemm import PLANS, K, only
from tests.support import sass
from tests.support.aot import Case, Compiled, compile_launch

ROWS = (16, 64, 2048)
N = 28672


@dataclass(frozen=True)
class CandidateCase(Case):
    """A candidate of one kind, and how the closed form's own choice is planned."""

    kind: Kind = Kind.FP8
    config: GemmConfig | None = None
    base: GemmConfig | None = None
    plan_base: Callable[[], Launch] | None = None


def candidate_cases() -> Iterator[CandidateCase]:
    """Every tile and number of warps that is not the closed form's, the farthest first."""
    for target in CUDA_TARGETS:
        for kind in (kind for kind in PLANS if kind in all_configs(target)):
            for m in ROWS:
                base = choose(kind, m, N, K, target)
                tiles = {tile_of(c): c for c in candidates_of(base, kind, target)}
                tiles.pop(tile_of(base))
                for tile, config in reversed(tiles.items()):
                    yield CandidateCase(
                        "candidate",
                        target,
                        f"{kind.value}-{m}-{'x'.join(map(str, tile))}",
                        partial(planned, kind, m, config, target),
                        kind=kind,
                        config=config,
                        base=base,
                        plan_base=partial(planned, kind, m, base, target),
                    )


def tile_of(config: GemmConfig) -> tuple[int | str, ...]:
    tile = (config.block_m, config.block_n, config.num_warps)
    return (*tile, "tma") if config.tma else tile


def planned(kind: Kind, m: int, config: GemmConfig, target: Target) -> Launch:
    with tuned.forced(Key(kind, bucket(m), N, K), config):
        return only(PLANS[kind](m, N, target), "gemm_")


def steps_of_instructions(compiled: Compiled) -> set[str]:
    """Matrix instructions of the main loop, without the sides of their tiles.

    ``HGMMA.64x16x16.F32.BF16`` becomes ``HGMMA.x16.F32.BF16``: the step along K and the dtypes.
    """
    code = [i.opcode for i in sass.main_loop(compiled) if i.base in sass.MATRIX_OPCODES]
    return {re.sub(r"\.\d+x\d+x(\d+)", r".x\1", opcode) for opcode in code}


@pytest.mark.aot_cases(list(candidate_cases()))
def test_a_candidate_multiplies_by_the_same_instruction(case: CandidateCase, compiled: Compiled):
    wanted = compile_launch(case.plan_base(), case.target)
    assert steps_of_instructions(compiled) == steps_of_instructions(wanted)
    assert compiled.shared <= shared_bytes(case.config, case.kind, case.target)
    sass.assert_fits(compiled)


def test_a_smaller_tile_would_take_another_instruction():
    # Why the tile's M side is watched on Hopper: fp16 instructions, for which codes are converted.
    base = choose(Kind.FP8, 256, N, K, SM_90)
    small = replace(base, block_m=16, num_warps=4)
    assert "another matrix instruction" in objection(small, base, Kind.FP8, SM_90)
    found = compile_launch(planned(Kind.FP8, 128, small, SM_90), SM_90)
    assert {i.base for i in sass.main_loop(found)} & set(sass.MATRIX_OPCODES) == {"HMMA"}
