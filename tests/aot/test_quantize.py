"""What the quantize kernels become on every target: wide accesses, exact divisions, no spills."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from mokernels.ops.launch import quantize as launch
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, Target
from tests.support import sass
from tests.support.aot import Case, Compiled

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8 = torch.float8_e4m3fn

# Few and many tokens of usual widths, a row that is read twice, narrow rows.
SHAPES = [(4096, 4096), (1, 4096), (16, 14336), (512, 28672), (8192, 128)]
ODD_SHAPES = [(33, 17), (7, 1), (100, 4097)]


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def scalar() -> torch.Tensor:
    return meta(dtype=FP32)


Plan = Callable[[torch.Tensor, Target], tuple[object, tuple[Launch, ...]]]
QUANTIZERS: dict[str, Plan] = {
    "quantize_fp8": lambda x, t: launch.plan_quantize_fp8(x, scalar(), target=t),
    "quantize_fp8_m": lambda x, t: launch.plan_quantize_fp8(x, scalar(), scalar(), target=t),
    "quantize_fp8_per_token": lambda x, t: launch.plan_quantize_fp8_per_token(x, target=t),
    "quantize_fp8_per_block": lambda x, t: launch.plan_quantize_fp8_per_block(x, target=t),
    "quantize_nvfp4": lambda x, t: launch.plan_quantize_nvfp4(x, scalar(), target=t),
    "quantize_mxfp8": lambda x, t: launch.plan_quantize_mxfp8(x, target=t),
    "fake_quantize_nvfp4": lambda x, t: launch.plan_fake_quantize_nvfp4(
        x, scalar(), BF16, target=t
    ),
    "fake_quantize_mxfp8": lambda x, t: launch.plan_fake_quantize_mxfp8(x, BF16, target=t),
}
DEQUANTIZERS: dict[str, Plan] = {
    "dequantize_fp8": lambda x, t: launch.plan_dequantize_fp8(
        x.to(FP8), scalar(), "bfloat16", target=t
    ),
    "dequantize_fp8_per_token": lambda x, t: launch.plan_dequantize_fp8(
        x.to(FP8), meta(x.shape[0], dtype=FP32), "bfloat16", target=t
    ),
    "dequantize_fp8_square": lambda x, t: launch.plan_dequantize_fp8(
        x.to(FP8), meta(-(-x.shape[0] // 128), -(-x.shape[1] // 128), dtype=FP32), "float16",
        target=t,
    ),
    "dequantize_nvfp4": lambda x, t: launch.plan_dequantize_nvfp4(
        meta(x.shape[0], x.shape[1] // 2, dtype=torch.uint8),
        meta(x.shape[0], x.shape[1] // 16, dtype=FP8), scalar(), "bfloat16", target=t,
    ),
    "dequantize_mxfp8": lambda x, t: launch.plan_dequantize_mxfp8(
        x.to(FP8), meta(x.shape[0], x.shape[1] // 32, dtype=torch.uint8), "float32", target=t
    ),
}  # fmt: skip
FAMILIES = {
    "quantize_fp8_m": "quantize_fp8",
    "dequantize_fp8_per_token": "dequantize_fp8",
    "dequantize_fp8_square": "dequantize_fp8",
}
MULTIPLES = {"nvfp4": 16, "mxfp8": 32}


def case(operator: str, plan: Plan, target: Target, x: torch.Tensor) -> Case:
    def make() -> Launch:
        (planned,) = plan(x, target)[1]
        return planned

    shape, dtype = "x".join(map(str, x.shape)), str(x.dtype).removeprefix("torch.")
    strided = "" if x.is_contiguous() else "-strided"
    name = f"{operator}-{shape}-{dtype}{strided}"
    return Case(FAMILIES.get(operator, operator), target, name, make, x.shape[-1] % 128 == 0)


def cases(targets: tuple[Target, ...]) -> list[Case]:
    tensors = [meta(*s, dtype=d) for s in SHAPES for d in (BF16, FP16, FP32)]
    tensors += [meta(8, 64, 4096)[:, :32], *(meta(*s) for s in ODD_SHAPES)]
    return [
        case(operator, plan, target, x)
        for operator, plan in (QUANTIZERS | DEQUANTIZERS).items()
        for target in targets
        for x in tensors
        if x.shape[-1] % MULTIPLES.get(operator.rpartition("_")[2], 1) == 0
        and (x.dim() == 2 or operator in QUANTIZERS)
    ]


def where(compiled: Compiled) -> str:
    return f"{compiled.name} on {compiled.target.name}"


def scale_cases(targets: tuple[Target, ...]) -> list[Case]:
    """A calibrated scale's multiplier and divisor; there is nothing wide about them."""
    name = "static_scales"
    make = lambda: launch.plan_static_scales(scalar())[1][0]  # noqa: E731
    return [Case(name, target, name, make, False) for target in targets]


CASES = cases(CUDA_TARGETS) + scale_cases(CUDA_TARGETS)


@pytest.mark.aot_cases(CASES)
def test_nvidia(case, compiled):
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    # The definition fixes every bit: no approximate division, nothing flushed to zero, and no
    # multiply-add but those written out.
    sass.assert_exact_division(compiled)
    flushed = set(re.findall(r"\b\w+\.(?:\w+\.)*ftz\S*", compiled.ptx))
    assert not flushed, f"{where(compiled)}: {flushed} in the PTX"
    fused = re.findall(r"\bfma\.rn\.f32(x2)?\b", compiled.ptx)
    found, wanted = len(fused) + fused.count("x2"), expected_multiply_adds(case)
    assert found in wanted, f"{where(compiled)}: {found} multiply-adds in the PTX, wanted {wanted}"
    if case.aligned:
        assert_wide(case, compiled)
    if "fp8" in case.family and case.family.startswith("quantize"):
        assert_converts(compiled)


def expected_multiply_adds(case: Case) -> tuple[int, ...]:
    """Two for each element of a thread where quotients of NVFP4 are corrected, none elsewhere.

    Or three: Triton 3.6 writes the product that is corrected as a multiply-add of zero.
    """
    if case.family not in ("quantize_nvfp4", "fake_quantize_nvfp4"):
        return (0,)
    planned = case.plan()
    elements = planned.constants["ROWS"] * planned.constants["COLUMNS"] // (32 * planned.num_warps)
    return 2 * elements, 3 * elements


def assert_wide(case: Case, compiled: Compiled) -> None:
    """All of the tile is loaded 128 bits at a time; the narrower loads are scales."""
    planned = case.plan()
    packed = case.family == "dequantize_nvfp4"
    # A thread stores 16 values in two pieces of 16 bytes; they come from 8 bytes of packed codes.
    bits = 64 if packed else 128
    tile = planned.constants["ROWS"] * planned.constants["COLUMNS"] // (2 if packed else 1)
    needed = tile * planned.args[0].element_size() * 8 // (32 * planned.num_warps * bits)
    code = [i for i in sass.instructions(compiled.sass) if i.base in ("LDG", "STG")]
    wide = [i for i in code if i.base == "LDG" and i.bits >= bits]
    assert len(wide) >= max(1, needed), (
        f"{where(compiled)}: {len(wide)} loads of {bits} bits, wanted {needed}, among "
        f"{[i.opcode for i in code]}"
    )
    assert any(i.base == "STG" and i.bits >= 64 for i in code), (
        f"{where(compiled)}: no wide store among {[i.opcode for i in code]}"
    )


def assert_converts(compiled: Compiled) -> None:
    """E4M3 codes are made by the instruction where the target rounds once with it, else by bits."""
    instructions = [i for i in sass.instructions(compiled.sass) if i.base == "F2FP"]
    native = any("E4M3" in i.opcode and "SATFINITE" in i.opcode for i in instructions)
    assert native == compiled.target.casts_fp8_once, (
        f"{where(compiled)}: conversions {[i.opcode for i in instructions]}"
    )


@pytest.mark.aot_cases(cases(HIP_TARGETS))
def test_amd(case, compiled):
    assert not compiled.spills
    sass.assert_fits(compiled)
    divides = case.family in QUANTIZERS and not case.family.endswith("mxfp8")
    if divides and "quantize_fp8_m-" not in case.name:
        # What an IEEE division of fp32 ends with.
        assert "v_div_fixup_f32" in compiled.amdgcn, f"{where(compiled)}: no exact division"
