"""What compilers make of one row times an E4M3 weight: loads, and instructions for a weight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mokernels.ops.launch import decode, gemm, linear
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, SM_80, SM_90, Target
from tests.aot.test_gemv import empty, layout_of_sums, loop_of
from tests.support import sass
from tests.support.aot import Case, Compiled, compile_launch

BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
SHAPES = ((28672, 4096), (1024, 16384), (4097, 4128))
"""N and K of a weight with enough tiles, of one whose K is split, and of one with a tail."""
SCALES = ("tensor", "channel", "128x128", "mxfp8")
INSTRUCTIONS_FOR_A_WEIGHT = 4.0
"""Of the main loop, whatever they are. Counted with triton 3.6 and 3.9 on sm_90: 3.2 with scales of
tensors and channels, 3.3 with blocks, 3.8 with exponents. An H200 has room for 6.8 in the time in
which it reads a byte."""
FOR_A_TAIL = 0.5
"""More of them for loads with masks."""
FOR_DECODING_BY_BITS = 2.5
"""More of them without an instruction that converts: counted on sm_80, 5.1 to 6.7 in all."""


def product(scales: str, n: int, k: int, target: Target, dtype: torch.dtype = BF16) -> Launch:
    x, codes, bias = empty(1, k, dtype=dtype), empty(n, k, dtype=FP8), empty(n, dtype=BF16)
    if scales == "mxfp8":
        exponents = empty(n, k // 32, dtype=torch.uint8)
        planned = decode.plan_mxfp8_decode(x, codes, exponents, bias, BF16, target=target)
    else:
        shapes = {"tensor": (), "channel": (n,), "128x128": (-(-n // 128), -(-k // 128))}
        scale = empty(*shapes[scales])
        planned = gemm.plan_fp8_weight_only(x, codes, scale, bias, target=target)
    return planned[1][0]


def cases(targets: tuple[Target, ...]) -> Iterator[Case]:
    for target in targets:
        for scales in SCALES:
            for dtype in (BF16, FP16):
                for n, k in SHAPES:
                    launch = product(scales, n, k, target, dtype)
                    name = f"{str(dtype)[6:]}-{n}x{k}"
                    yield Case(f"gemv-e4m3-{scales}", target, name, lambda it=launch: it)


CASES = list(cases(CUDA_TARGETS))


@pytest.mark.aot_cases(CASES)
def test_main_loop(case: Case, compiled: Compiled):
    assert case.plan().kernel.__name__ == "gemv_e4m3"
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    loop = loop_of(compiled)
    # Four rows of the weight and 32 bytes of x come in 16 bytes, and stay in the thread.
    assert sass.count(i for i in loop if i.bits == 128)["LDG"] >= 6
    shared = [i.opcode for i in loop if i.base in ("STS", "LDS", "LDSM", "BAR", "SHFL", "LDGSTS")]
    assert not shared, shared
    assert ("cvt.rn.f16x2.e4m3x2" in compiled.ptx) == (case.target is not SM_80)


def weights_of(loop: list[sass.Instruction], scaled: bool) -> float:
    """How many weights the main loop multiplies; a scale takes one multiply-add for 16 of them."""
    used = sass.count(loop)
    return (used["FFMA"] + 2 * used["FFMA2"]) * (16 / 17 if scaled else 1)


@pytest.mark.aot_cases(CASES)
def test_instructions_for_a_weight(case: Case, compiled: Compiled):
    loop = loop_of(compiled)
    weights = weights_of(loop, case.plan().args[2] is not None)
    assert weights % 64 == 0
    most = INSTRUCTIONS_FOR_A_WEIGHT
    most += FOR_A_TAIL * (not case.plan().constants["EVEN_K"])
    most += FOR_DECODING_BY_BITS * (case.target is SM_80)
    found = len(loop) / weights
    assert found <= most, f"{found:.2f}: {sass.count(loop)}"


@pytest.mark.parametrize("target", [SM_80, SM_90], ids=lambda target: target.name)
def test_the_order_of_addition_depends_on_no_shape_no_scale_and_no_dtype(target):
    large = ("tensor", 28672, 4096, BF16)
    shapes = [large, ("128x128", *large[1:]), ("mxfp8", *large[1:3], FP16)]
    shapes += [("mxfp8", 4097, 4128, BF16), ("channel", 1024, 16384, FP16)]
    launches = (product(*it[:3], target, it[3]) for it in shapes)
    assert len({layout_of_sums(compile_launch(it, target)) for it in launches}) == 1


@pytest.mark.parametrize("target", HIP_TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("scales", SCALES)
def test_compiles_for_amd(target, scales):
    compiled = compile_launch(product(scales, 28672, 4096, target), target)
    assert "v_fma" in compiled.amdgcn or "v_pk_fma" in compiled.amdgcn
    assert not compiled.spills


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_a_large_quantized_weight_takes_two_launches(dtype):
    n, k = SHAPES[0]
    weight = (empty(n, k, dtype=FP8), empty(n, k // 32, dtype=torch.uint8))
    _, launches = linear.plan_mxfp8_linear(empty(1, k, dtype=dtype), *weight, None, target=SM_90)
    assert [one.kernel.__name__ for one in launches] == ["quantize_blocks", "gemv_e4m3"]
