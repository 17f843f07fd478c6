"""What the compilers make of the FP8 products that quantize their activations themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mokernels.ops.launch import linear
from mokernels.ops.launch.plan import Launch
from mokernels.ops.quantizing import TOKEN_K_IN_GEMM
from mokernels.ops.target import GFX950, SM_89, SM_90, SM_100, SM_120, Target
from tests.support import sass
from tests.support.aot import Case, Compiled, compile_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
K = 4096
WEIGHTS = (28672, 1024)
"""N of a weight with enough tiles, and of one whose K is split."""
MATRIX_INSTRUCTION = {SM_89: "QMMA", SM_90: "QGMMA", SM_100: "UTCQMMA", SM_120: "QMMA"}


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(
    how: str, m: int, n: int, target: Target, dtype: torch.dtype = BF16, k: int = K
) -> Launch | None:
    """The launch that quantizes and multiplies; None where there are two of them.

    With a scale for each token K is shorter, by the same tail: longer rows are quantized before.
    """
    if how == "token":
        k = TOKEN_K_IN_GEMM - (-k % 128)
    x, weight, scale = empty(m, k, dtype=dtype), empty(n, k, dtype=torch.float8_e4m3fn), empty(n)
    bias = empty(n, dtype=BF16)
    if how == "static":
        arguments = (x, weight, scale, empty(), bias, empty())
        launches = linear.plan_fp8_linear(*arguments, target=target)[1]
    elif how == "token":
        launches = linear.plan_fp8_per_token_linear(x, weight, scale, bias, target=target)[1]
    else:
        scale = empty(-(-n // 128), -(-k // 128))
        launches = linear.plan_fp8_block_linear(x, weight, scale, bias, target=target)[1]
    return launches[0] if launches[0].kernel.__name__.startswith("gemm") else None


def cases(dtypes: tuple[torch.dtype, ...], k: int = K) -> Iterator[Case]:
    for target in MATRIX_INSTRUCTION:
        for how, m in (("static", 32), ("static", 1), ("token", 1), ("block", 1)):
            for dtype in dtypes:
                for n in WEIGHTS:
                    launch = product(how, m, n, target, dtype, k)
                    if launch is not None:
                        name = f"{str(dtype)[6:]}-{m}x{n}x{k}"
                        yield Case(f"quantizing-{how}", target, name, lambda it=launch: it)


CASES = list(cases((BF16, FP32, FP16)))
TAILS = list(cases((BF16, FP32), 4080))


def test_every_target_and_way_is_compiled():
    found = {(case.target, case.family) for case in CASES}
    wanted = [
        (t, f"quantizing-{how}") for t in MATRIX_INSTRUCTION for how in ("static", "token", "block")
    ]
    assert found == set(wanted)
    splits = {(case.target, case.plan().constants["SPLIT"]) for case in CASES}
    assert {target for target, split in splits if split} == set(MATRIX_INSTRUCTION)


@pytest.mark.aot_cases(CASES)
def test_main_loop(case: Case, compiled: Compiled):
    loop = sass.main_loop(compiled)
    # Codes of x as they are: nothing is decoded to a wider type on the way.
    sass.assert_matrix_instruction(compiled, MATRIX_INSTRUCTION[case.target])
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    copies = [i for i in loop if i.base == "LDGSTS"]
    assert copies, "the operands of the next steps are not loaded ahead"
    assert {i.bits for i in copies} == {128}
    # The weight's scale of a step is one number: all else is copied ahead.
    waited_for = [i.bits for i in loop if i.base == "LDG"]
    assert waited_for == ([32] * len(waited_for) if case.family == "quantizing-block" else [])


@pytest.mark.aot_cases(CASES)
def test_x_is_encoded_once_by_each_program(case: Case, compiled: Compiled):
    # In the layout of the matrix instruction every warp would encode all of x.
    constants, threads = case.plan().constants, 32 * case.plan().num_warps
    elements = constants["BLOCK_M"] * constants["BLOCK_K"] // threads
    loop = sass.main_loop(compiled)
    if constants["CASTS_ONCE"]:
        conversions = [i for i in loop if i.opcode.startswith("F2FP") and "E4M3" in i.opcode]
        assert len(conversions) * 2 == elements
    else:
        multiplications = sum(i.base in ("FMUL", "FMUL2") for i in loop)
        assert 0 < multiplications <= 2 * elements


@pytest.mark.aot_cases(TAILS)
def test_k_that_no_step_divides(case: Case, compiled: Compiled):
    sass.assert_matrix_instruction(compiled, MATRIX_INSTRUCTION[case.target])
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)


@pytest.mark.parametrize(("how", "m"), [("static", 1), ("static", 32), ("token", 1)])
def test_compiles_for_amd(how, m):
    launch = product(how, m, 4096, GFX950)
    assert launch is not None
    compiled = compile_launch(launch, GFX950)
    assert "v_mfma" in compiled.amdgcn
    assert not compiled.spills


def test_one_bucket_of_rows_shares_a_binary():
    for how, first, last in (("static", 17, 32), ("token", 1, 16), ("block", 1, 16)):
        constants = [product(how, m, 28672, SM_90).constants for m in (first, last)]
        assert constants[0] == constants[1]
