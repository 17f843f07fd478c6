"""What the compilers make of the end of a split K: how programs tell that they are the last."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest

from mokernels.ops import gemm_config
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, Target
from tests.aot import test_gemm, test_gemm_quantizing, test_gemv, test_gemv_e4m3
from tests.support import sass
from tests.support.aot import Case, Compiled, compile_launch

MODULES = (test_gemm, test_gemm_quantizing, test_gemv, test_gemv_e4m3)
KERNELS = (
    "gemv_nvfp4",
    "gemv_e4m3",
    "gemm_native",
    "gemm_epilogue",
    "gemm_quantizing",
    "gemm_block",
    "gemm_decode",
)


def cases() -> Iterator[Case]:
    """Each kernel that splits K, on two targets that have it; its largest tile."""
    found: dict[tuple[str, Target], tuple[int, Case]] = {}
    for case in (case for module in MODULES for case in module.CASES):
        launch = case.plan()
        tile = launch.constants.get("BLOCK_M", 1) * launch.constants["BLOCK_N"]
        if launch.constants.get("SPLIT") == "last":
            place = launch.kernel.__name__, case.target
            best = found.setdefault(place, (tile, case))
            found[place] = max(best, (tile, case), key=lambda it: it[0])
    for row, kernel in enumerate(KERNELS):
        having = [target for target in CUDA_TARGETS if (kernel, target) in found]
        for target in (having[(row + turn) % len(having)] for turn in range(2)):
            _, case = found[kernel, target]
            yield replace(case, family="last", name=f"{kernel}-{case.name}")


CASES = list(cases())


def test_every_kernel_that_splits_k_is_compiled():
    assert len(CASES) == 2 * len(KERNELS)
    assert {case.target for case in CASES} == set(CUDA_TARGETS)
    launches = (case.plan() for module in MODULES for case in module.CASES)
    split = {one.kernel.__name__ for one in launches if one.constants.get("SPLIT") == "last"}
    assert split == set(KERNELS)


@pytest.mark.aot_cases(CASES)
def test_the_last_program_is_told_by_one_atomic(case: Case, compiled: Compiled):
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    # No sum is added to memory, and no program waits for another.
    assert re.findall(r"\b(?:atom|red)\.[\w.:]*", compiled.ptx.replace("shared.", "")) == [
        "atom.global.gpu.acq_rel.add.u32"
    ]
    before, after = compiled.ptx.split("atom.global.gpu.acq_rel.add.u32")
    # All threads have stored their sums and wait, one counts, and all wait for what it found.
    last_store, last_barrier = before.rindex("st.global"), before.rindex("bar.sync")
    assert last_store < last_barrier
    assert after.index("bar.sync") < after.index("ld.global.cg")
    assert "ld.global" not in after.replace("ld.global.cg", "").split("st.global")[0]
    # Partial sums come from where processors meet, the L2 cache; a GEMV has too few for more
    # than a number at a time.
    wide = case.plan().constants.get("BLOCK_M", 1) > 1
    loads = [i for i in sass.instructions(compiled.sass) if i.opcode.startswith("LDG")]
    shared = {i.bits for i in loads if "STRONG.GPU" in i.opcode}
    assert shared == {128 if wide else 32}


def reduce_cases() -> Iterator[Case]:
    for target in CUDA_TARGETS:
        yield Case("reduce", target, "bf16", partial(second_launch, target))


def second_launch(target: Target) -> Launch:
    with patch.object(gemm_config, "LAST_PROGRAM_BYTES", 0):
        return test_gemm.only(test_gemm.fp8(64, 1024, target), "reduce")


@pytest.mark.aot_cases(list(reduce_cases()))
def test_the_second_launch(case: Case, compiled: Compiled):
    sass.assert_no_spills(compiled)
    assert any(i.base == "LDG" and i.bits == 128 for i in sass.instructions(compiled.sass))


@pytest.mark.parametrize("target", HIP_TARGETS, ids=lambda target: target.name)
def test_the_second_launch_compiles_for_amd(target):
    planned = test_gemm.fp8(2, 1024, target)
    assert [one.constants.get("SPLIT") for one in planned[1]] == ["parts", None]
    assert not compile_launch(planned[1][1], target).spills
