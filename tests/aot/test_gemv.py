"""What compilers make of one row times an NVFP4 weight: loads, and integer work for a weight."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from mokernels.ops.configs import Kind, choose
from mokernels.ops.launch import decode, linear
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, SM_80, SM_89, SM_90, Target
from tests.support import sass
from tests.support.aot import Case, Compiled, compile_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = ((28672, 4096), (1024, 16384), (4097, 4128))
"""N and K of a weight with enough tiles, of one whose K is split, and of one with a tail."""
MULTIPLY_ADDS = ("FFMA", "FFMA2")
INTEGER = ("LOP3", "SHF", "PRMT", "IADD3", "LEA", "SEL", "ISETP")
"""Of 64 lanes a clock and processor; multiply-adds of integers have the floats' unit instead."""
INTEGER_FOR_A_WEIGHT = 2.0


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(n: int, k: int, target: Target, dtype: torch.dtype = BF16) -> Launch:
    codes, scale = empty(n, k // 2, dtype=torch.uint8), empty(n, k // 16, dtype=torch.float8_e4m3fn)
    tail = (None, empty(), empty(n, dtype=BF16), BF16)
    _, (launch, *_) = decode.plan_nvfp4_decode(
        empty(1, k, dtype=dtype), codes, scale, *tail, target=target
    )
    return launch


def cases(targets: tuple[Target, ...], dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    for target in targets:
        for dtype in dtypes:
            for n, k in SHAPES:
                launch = product(n, k, target, dtype)
                name = f"{str(dtype)[6:]}-{n}x{k}"
                yield Case("gemv-nvfp4", target, name, lambda it=launch: it)


CASES = list(cases(CUDA_TARGETS, (BF16, FP16, FP32)))


def loop_of(compiled: Compiled) -> list[sass.Instruction]:
    return sass.main_loop(compiled, MULTIPLY_ADDS)


@pytest.mark.aot_cases(CASES)
def test_main_loop(case: Case, compiled: Compiled):
    assert case.plan().kernel.__name__ == "gemv_nvfp4"
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    loop = loop_of(compiled)
    # Weights and x come in 16 bytes, and stay in the thread that loads them.
    assert sass.count(i for i in loop if i.bits == 128)["LDG"] >= 8
    shared = [i.opcode for i in loop if i.base in ("STS", "LDS", "LDSM", "BAR", "SHFL", "LDGSTS")]
    assert not shared, shared


@pytest.mark.aot_cases([case for case in CASES if case.target in (SM_80, SM_89, SM_90)])
def test_integer_instructions_for_a_weight(case: Case, compiled: Compiled):
    used = sass.count(loop_of(compiled))
    # Of 34 multiply-adds 32 are of weights, two of block scales.
    weights = used["FFMA"] * 32 / 34
    integer = sum(used[opcode] for opcode in INTEGER) / weights
    assert integer <= INTEGER_FOR_A_WEIGHT, f"{integer:.2f} of {used}"


def layout_of_sums(compiled: Compiled) -> str:
    """Which thread has which partial sums, as the definition of the layout that they end in."""
    _, _, reduction = compiled.ttgir.partition('"tt.reduce"')
    alias = re.search(r"\(tensor<4x64xf32, (#\w+)>\) ->", reduction)
    assert alias is not None, "no reduction"
    (layout,) = re.findall(rf"^{alias[1]} = (.*)$", compiled.ttgir, re.MULTILINE)
    return layout


@pytest.mark.parametrize("target", [SM_80, SM_90], ids=lambda target: target.name)
def test_the_order_of_addition_depends_on_no_shape_and_no_dtype(target):
    shapes = [(1, 32, BF16), (7, 4096, BF16), (28672, 4096, BF16), (28672, 4096, FP32)]
    shapes += [(4096, 4128, FP16), (4096, 16384, BF16)]
    layouts = {
        layout_of_sums(compile_launch(product(*it[:2], target, it[2]), target)) for it in shapes
    }
    assert len(layouts) == 1, layouts


@pytest.mark.parametrize("target", HIP_TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_compiles_for_amd(target, dtype):
    compiled = compile_launch(product(28672, 4096, target, dtype), target)
    assert "v_fma" in compiled.amdgcn or "v_pk_fma" in compiled.amdgcn
    assert not compiled.spills


def test_a_large_quantized_weight_takes_two_launches():
    weight = (empty(28672, 2048, dtype=torch.uint8), empty(28672, 256, dtype=torch.float8_e4m3fn))
    scales = (empty(), empty(), None)
    x = empty(1, 4096, dtype=BF16)
    _, launches = linear.plan_nvfp4_linear(x, *weight, *scales, target=SM_90)
    assert [one.kernel.__name__ for one in launches] == ["quantize_blocks", "gemv_nvfp4"]
    assert choose(Kind.GEMV_NVFP4, 1, 28672, 4096, SM_90).split_k == 1
