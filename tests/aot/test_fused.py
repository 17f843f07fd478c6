"""What the kernels that compute and quantize become: wide accesses, no spills, no contraction."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mokernels.ops.launch.fused import plan_gated_quantize, plan_norm_quantize
from mokernels.ops.launch.plan import Launch
from mokernels.ops.quantize import QUANTIZERS
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, Target
from tests.support import sass
from tests.support.aot import Case, Compiled

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EPS = 1e-6


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def extra(name: str) -> tuple[Tensor, ...]:
    return (meta(dtype=FP32),) if name == "fp8" or name.startswith("nvfp4") else ()


def norm(name: str, x: Tensor, style: str, add: bool, target: Target) -> Launch:
    residual, weight = (x if add else None), meta(x.shape[-1], dtype=x.dtype)
    args = (name, x, residual, weight, EPS, style, *extra(name))
    (planned,) = plan_norm_quantize(*args, target=target)[1]
    return planned


def gated(name: str, both: Tensor, activation: str, target: Target) -> Launch:
    gate, up = both.chunk(2, dim=-1)
    (planned,) = plan_gated_quantize(name, gate, up, activation, *extra(name), target=target)[1]
    return planned


# The longest row that stays in registers, in the widest dtype; usual rows; one that is read again;
# a row without alignment.
NORMS = {
    "16384-float32": lambda f, t: norm(f, meta(16, 16384, dtype=FP32), "cast_then_scale", True, t),
    "4096-bfloat16": lambda f, t: norm(f, meta(16, 4096), "cast_then_scale", True, t),
    "5120-float16": lambda f, t: norm(f, meta(9, 5120, dtype=FP16), "one_plus_weight", False, t),
    "28672-bfloat16": lambda f, t: norm(f, meta(1, 28672), "scale_then_cast", True, t),
    "odd": lambda f, t: norm(f, meta(7, 2080)[:, 1:2049], "cast_then_scale", False, t),
}
GATES = {
    "14336-silu": lambda f, t: gated(f, meta(512, 2 * 14336), "silu", t),
    "4096-gelu_tanh-float32": lambda f, t: gated(f, meta(1, 8192, dtype=FP32), "gelu_tanh", t),
    "28672-silu-float16": lambda f, t: gated(f, meta(9, 2 * 28672, dtype=FP16), "silu", t),
    "12288-gelu": lambda f, t: gated(f, meta(64, 2 * 12288), "gelu", t),
    "odd": lambda f, t: gated(f, meta(7, 2080)[:, 1:2049], "silu", t),
}
Plan = Callable[[str, Target], Launch]


def cases(targets: tuple[Target, ...]) -> Iterator[Case]:
    for kernel, plans in (("norm", NORMS), ("gated", GATES)):
        for number, target in enumerate(targets):
            # Each target begins with another quantizer: the quick level compiles the first.
            names = [*QUANTIZERS][number:] + [*QUANTIZERS][:number]
            for key, plan in plans.items():
                for name in names:
                    yield case(kernel, name, key, plan, target)


def case(kernel: str, name: str, key: str, plan: Plan, target: Target) -> Case:
    return Case(kernel, target, f"{name}-{key}", lambda: plan(name, target), aligned=key != "odd")


def where(compiled: Compiled) -> str:
    return f"{compiled.name} on {compiled.target.name}"


CASES = list(cases(CUDA_TARGETS))


@pytest.mark.aot_cases(CASES)
def test_nvidia(case, compiled):
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    sass.assert_exact_division(compiled)
    if not case.name.endswith("-gelu"):
        assert_as_written(case, compiled)
    if case.aligned:
        assert_wide(case, compiled)


def assert_as_written(case: Case, compiled: Compiled) -> None:
    """No flushing to zero, and no multiply-adds but those of NVFP4's quotients.

    The erf of "gelu" is the vendor's function, which has both.
    """
    flushed = set(re.findall(r"\b\w+\.(?:\w+\.)*ftz\S*", compiled.ptx))
    assert not flushed, f"{where(compiled)}: {flushed} in the PTX"
    planned = case.plan()
    assert not planned.fp_fusion
    fused = re.findall(r"\bfma\.rn\.f32(x2)?\b", compiled.ptx)
    found, wanted = len(fused) + fused.count("x2"), 0
    if planned.constants["FORMAT"] == "nvfp4":
        rows = planned.constants.get("ROWS", 1)
        wanted = 2 * rows * planned.constants["COLUMNS"] // (32 * planned.num_warps)
    # Triton 3.6 writes a product that is corrected as a multiply-add of zero.
    assert found in (wanted, wanted * 3 // 2), f"{where(compiled)}: {found}, wanted {wanted}"


def assert_wide(case: Case, compiled: Compiled) -> None:
    """Rows are loaded 128 bits at a time, all of them; only a scale is loaded by itself."""
    code = [i for i in sass.instructions(compiled.sass) if i.base in ("LDG", "STG")]
    opcodes = Counter(i.opcode for i in code)
    planned = case.plan()
    rows = planned.constants.get("ROWS", 1)
    tile = rows * planned.constants["COLUMNS"] * planned.args[0].element_size()
    # Two operands at the least: gate and up, or x and the weight.
    needed = 2 * tile // (16 * 32 * planned.num_warps)
    wide = sum(i.base == "LDG" and i.bits == 128 for i in code)
    narrow = sum(i.base == "LDG" and i.bits < 128 for i in code)
    assert wide >= needed, f"{where(compiled)}: {wide} wide loads, wanted {needed}: {opcodes}"
    assert narrow <= 1, f"{where(compiled)}: {narrow} narrow loads: {opcodes}"
    assert any(i.base == "STG" and i.bits >= 64 for i in code), f"{where(compiled)}: {opcodes}"


@pytest.mark.aot_cases(list(cases(HIP_TARGETS)))
def test_amd(case, compiled):
    assert not compiled.spills
    sass.assert_fits(compiled)
    # GELU has no division, and neither has MXFP8.
    if not (case.name.endswith("-gelu") and case.name.startswith("mxfp8")):
        assert "v_div_fixup_f32" in compiled.amdgcn, f"{where(compiled)}: no exact division"
