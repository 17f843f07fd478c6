"""What compilers make of NVFP4 and MXFP8 products that quantize their one row themselves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mokernels.ops.launch import linear
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import GFX942, GFX950, SM_80, SM_89, SM_90, SM_100, Target
from tests.support import sass
from tests.support.aot import Case, Compiled, compile_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = {"nvfp4": ((12288, 256), (960, 4096)), "mxfp8": ((12288, 512), (1024, 4096))}
"""N and K of a weight with enough tiles, and of one whose K is split; larger ones take two launches
(test_gemv.py, test_gemv_e4m3.py)."""
MATRIX_INSTRUCTION = {SM_80: "HMMA", SM_89: "HMMA", SM_90: "HGMMA"}
"""But for few rows by NVFP4 Hopper's is a warp's own."""


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(
    name: str, n: int, target: Target, dtype: torch.dtype = BF16, k: int = 4096, m: int = 1
) -> tuple[Launch, ...]:
    x, bias = empty(m, k, dtype=dtype), empty(n, dtype=BF16)
    if name == "nvfp4":
        weight = (empty(n, k // 2, dtype=torch.uint8), empty(n, k // 16, dtype=torch.float8_e4m3fn))
        return linear.plan_nvfp4_linear(x, *weight, empty(), empty(), bias, target=target)[1]
    weight = (empty(n, k, dtype=torch.float8_e4m3fn), empty(n, k // 32, dtype=torch.uint8))
    return linear.plan_mxfp8_linear(x, *weight, bias, target=target)[1]


def cases(dtypes: tuple[torch.dtype, ...], tail: int = 0) -> Iterator[Case]:
    for target in MATRIX_INSTRUCTION:
        for name in ("nvfp4", "mxfp8"):
            for dtype in dtypes:
                for n, k in SHAPES[name]:
                    launch = product(name, n, target, dtype, k + tail)[0]
                    label = f"{str(dtype)[6:]}-1x{n}x{k + tail}"
                    yield Case(f"row-{name}", target, label, lambda it=launch: it)


CASES = list(cases((BF16, FP32, FP16)))
TAILS = list(cases((BF16,), tail=32))


def instruction_of(case: Case) -> str:
    return "HMMA" if case.family == "row-nvfp4" else MATRIX_INSTRUCTION[case.target]


@pytest.mark.aot_cases(CASES)
def test_main_loop(case: Case, compiled: Compiled):
    sass.assert_matrix_instruction(compiled, instruction_of(case))
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    loop = sass.main_loop(compiled)
    assert [i for i in loop if i.base == "LDGSTS"], "weights of the next steps are not loaded ahead"


@pytest.mark.aot_cases([case for case in CASES if case.name.startswith("bfloat16")])
def test_a_row_costs_little_beside_the_weights(case: Case, compiled: Compiled):
    # 16 rows quantized by every program would take more instructions than all of their weights.
    name, n = case.plan().constants["FORMAT"], case.plan().args[9]
    quantizing, decoding, *_ = product(name, n, case.target, m=2)
    assert quantizing.kernel.__name__ == "quantize_blocks"
    plain = sass.main_loop(compile_launch(decoding, case.target))
    assert len(sass.main_loop(compiled)) <= 1.5 * len(plain)


@pytest.mark.aot_cases(TAILS)
def test_k_that_no_step_divides(case: Case, compiled: Compiled):
    sass.assert_matrix_instruction(compiled, instruction_of(case))
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)


def test_where_block_scales_are_applied_codes_are_quantized_first():
    for name in ("nvfp4", "mxfp8"):
        kernels = [one.kernel.__name__ for one in product(name, 28672, SM_100)]
        assert kernels[:2] == ["quantize_blocks", "gemm_native"]


# gfx950 takes MXFP8 as it is, from a quantizer.
@pytest.mark.parametrize(
    ("name", "target"),
    [("nvfp4", GFX942), ("nvfp4", GFX950), ("mxfp8", GFX942)],
    ids=lambda value: getattr(value, "name", value),
)
def test_compiles_for_amd(name, target):
    (launch, *_) = product(name, 960, target)
    compiled = compile_launch(launch, target)
    assert launch.constants["QUANTIZE"]
    assert "v_mfma" in compiled.amdgcn
    assert not compiled.spills
