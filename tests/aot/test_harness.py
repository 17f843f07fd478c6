"""The harness itself: it compiles for every target, and every assertion of it can fail."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, SM_80, SM_89, SM_90, SM_100, SM_120
from tests.support import sass
from tests.support.aot import Case, Compiled, compile_launch, select_cases


@triton.jit
def divide_kernel(x, y, n, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + offsets, mask=offsets < n, other=1.0)
    q = tl.div_rn(448.0, a) if EXACT else 448.0 / a
    tl.store(y + offsets, q, mask=offsets < n)


@triton.jit
def dot_kernel(a, b, c, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        lhs = tl.load(a + m[:, None] * K + start + k[None, :])
        rhs = tl.load(b + n[None, :] * K + start + k[:, None])
        acc = tl.dot(lhs, rhs, acc)
    tl.store(c + m[:, None] * N + n[None, :], acc)


def divide(exact: bool = True, dtype: torch.dtype = torch.float32) -> Launch:
    x = torch.empty(4096, dtype=dtype, device="meta")
    return Launch(divide_kernel, (4, 1, 1), (x, x, 4096), {"EXACT": exact, "BLOCK": 1024})


def dot(dtype: torch.dtype, k: int = 4096, m: int = 128, n: int = 128, warps: int = 8) -> Launch:
    a, b = (torch.empty(rows, k, dtype=dtype, device="meta") for rows in (m, n))
    c = torch.empty(m, n, device="meta")
    constants = {"M": m, "N": n, "BLOCK_K": 64}
    return Launch(dot_kernel, (1, 1, 1), (a, b, c, k), constants, num_warps=warps)


@pytest.mark.parametrize("target", [*CUDA_TARGETS, *HIP_TARGETS], ids=lambda t: t.name)
def test_compiles_for_every_target(target):
    compiled = compile_launch(divide(), target)
    assert compiled.name == "divide_kernel"
    assert compiled.stack == 0
    assert not compiled.spills
    assert "#ttg" in compiled.ttgir or "#blocked" in compiled.ttgir
    if target.backend == "cuda":
        sass.assert_exact_division(compiled)
        sass.assert_wide_loads(compiled)
        assert f"target sm_{target.arch}" in compiled.ptx
    else:
        assert str(target.arch) in compiled.amdgcn


@pytest.mark.parametrize(
    ("target", "dtype", "opcode"),
    [
        (SM_80, torch.bfloat16, "HMMA"),
        (SM_89, torch.float8_e4m3fn, "QMMA"),
        (SM_90, torch.float8_e4m3fn, "QGMMA"),
        (SM_90, torch.bfloat16, "HGMMA"),
        (SM_100, torch.float8_e4m3fn, "UTCQMMA"),
        (SM_120, torch.float8_e4m3fn, "QMMA"),
    ],
    ids=str,
)
def test_finds_the_matrix_instruction_of_the_main_loop(target, dtype, opcode):
    compiled = compile_launch(dot(dtype), target)
    sass.assert_matrix_instruction(compiled, opcode)
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    sass.assert_wide_loads(compiled, sass.main_loop(compiled))
    with pytest.raises(AssertionError, match="the main loop multiplies with"):
        sass.assert_matrix_instruction(compiled, "DMMA")


def test_a_kernel_without_a_loop_has_no_main_loop():
    with pytest.raises(AssertionError, match="no loop holds any of HMMA"):
        sass.main_loop(compile_launch(divide(), SM_90))


def test_inexact_division_is_found():
    with pytest.raises(AssertionError, match=r"div\.full"):
        sass.assert_exact_division(compile_launch(divide(exact=False), SM_90))


def test_spills_are_found():
    compiled = compile_launch(dot(torch.bfloat16, m=256, n=256, warps=4), SM_80)
    assert compiled.stack > 0
    with pytest.raises(AssertionError, match="registers spill"):
        sass.assert_no_spills(compiled)


def test_narrow_loads_are_found():
    # Rows of 4097 elements are not aligned, so that nothing wider than one element can be loaded.
    compiled = compile_launch(dot(torch.bfloat16, k=4097), SM_90)
    with pytest.raises(AssertionError, match=r"0 wide loads .* wanted at least 1"):
        sass.assert_wide_loads(compiled, sass.main_loop(compiled))


def test_too_much_shared_memory_is_found():
    compiled = compile_launch(dot(torch.bfloat16), SM_90)
    small = Compiled(**{**compiled.__dict__, "target": SM_89, "shared": 100 * 1024})
    with pytest.raises(AssertionError, match="102400 bytes of shared memory, the limit is 101376"):
        sass.assert_fits(small)


def test_missing_opcode_is_found():
    compiled = compile_launch(divide(), SM_90)
    sass.assert_opcode(compiled, r"^LDG\.E\.128")
    with pytest.raises(AssertionError, match="no instruction matches 'F2FP'"):
        sass.assert_opcode(compiled, "F2FP")


def test_instructions_are_read():
    text = """
        /*0070*/              @!P0 LDG.E.128.CONSTANT R4, [R2] ; /* 0x04047981 */
        /*0080*/                   LDGSTS.E.BYPASS.128 [R7+0x10], desc[UR4][R2.64] ;  /* 0x00 */
        /*0090*/               @P1 BRA 0x70 ;
        /*00a0*/                   LDG.E.U8 R4, [R2] ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0;
    """
    code = sass.instructions(text)
    assert [i.base for i in code] == ["LDG", "LDGSTS", "BRA", "LDG", "EXIT", "BRA"]
    assert [i.bits for i in code[:4]] == [128, 128, 32, 8]
    assert sass.loops(code) == [code[:3]]


def cases(count: int) -> list[Case]:
    return [
        Case(family, target, str(number), divide)
        for family in ("one", "two")
        for target in (SM_80, SM_90)
        for number in range(count)
    ]


def test_quick_takes_one_case_of_each_family_and_target():
    chosen = [str(case) for case in select_cases(cases(30), "quick", day=1)]
    assert chosen == ["one-sm_80-0", "one-sm_90-0", "two-sm_80-0", "two-sm_90-0"]


def test_ci_reaches_every_case_in_turn():
    everything = cases(30)
    assert select_cases(everything, "all", day=1) == everything
    days = [select_cases(everything, "ci", day) for day in range(1, 7)]
    assert [len(chosen) for chosen in days] == [24] * 6
    assert {str(c) for chosen in days for c in chosen} == {str(c) for c in everything}
