"""What the compilers make of every GEMM configuration: instructions, registers, shared memory.

Cases go through the launchers, so that what is compiled is what would run: for every kind of
product and every bucket of M, one weight that splits K and one that does not; and, for many rows
that keep the order of one, the parts of K one after the other. Products by TMA are compiled in
test_gemm_persistent.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch

from mokernels.ops import configs
from mokernels.ops.config_limits import shared_bytes
from mokernels.ops.configs import (
    PARALLEL_ROWS,
    GemmConfig,
    Kind,
    all_configs,
    choose,
    choose_without_tma,
)
from mokernels.ops.kinds import GEMVS
from mokernels.ops.launch import decode, gemm
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import (
    CUDA_TARGETS,
    GFX950,
    HIP_TARGETS,
    SM_80,
    SM_89,
    SM_90,
    SM_100,
    SM_120,
    Target,
)
from tests.support import sass
from tests.support.aot import Case, Compiled, compile_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8, U8 = torch.float8_e4m3fn, torch.uint8
K = 4096
ROWS = (2, 32, 64, 128, 256, 512, 2048)
"""One M of every bucket; one row alone may go elsewhere (test_gemv.py, test_gemv_e4m3.py)."""
WEIGHTS = (28672, 4096)
"""N of a weight with enough tiles, and of one whose K is split for few rows."""

FP8_KINDS = (Kind.FP8, Kind.FP8_FAST, Kind.FP8_BLOCK)
HALF_KINDS = (Kind.HALF_FP8, Kind.HALF_BLOCK, Kind.HALF_NVFP4, Kind.HALF_MXFP8)
MATRIX_INSTRUCTION: dict[Target, dict[Kind, str]] = {
    SM_80: dict.fromkeys((*FP8_KINDS, *HALF_KINDS), "HMMA"),
    SM_89: dict.fromkeys(FP8_KINDS, "QMMA") | dict.fromkeys(HALF_KINDS, "HMMA"),
    SM_90: dict.fromkeys(FP8_KINDS, "QGMMA") | dict.fromkeys(HALF_KINDS, "HGMMA"),
    SM_100: dict.fromkeys((*FP8_KINDS, Kind.MXFP8), "UTCQMMA")
    | dict.fromkeys(HALF_KINDS, "UTCHMMA")
    | {Kind.NVFP4: "UTCOMMA"},
    SM_120: dict.fromkeys((*FP8_KINDS, Kind.MXFP8), "QMMA")
    | dict.fromkeys(HALF_KINDS, "HMMA")
    | {Kind.NVFP4: "OMMA"},
}


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def fp8(
    m: int, n: int, target: Target, fast: bool = False, invariant: bool = False
) -> gemm.Planned:
    a, b = empty(m, K, dtype=FP8), empty(n, K, dtype=FP8)
    scales = (empty(m), empty(n))
    return gemm.plan_fp8_gemm(
        a, b, *scales, empty(n, dtype=BF16), BF16, fast, target=target, invariant=invariant
    )


def fp8_fast(m: int, n: int, target: Target, invariant: bool = False) -> gemm.Planned:
    return fp8(m, n, target, True, invariant)


def fp8_block(m: int, n: int, target: Target, invariant: bool = False) -> gemm.Planned:
    a, b = empty(m, K, dtype=FP8), empty(n, K, dtype=FP8)
    scales = (empty(m, K // 128), empty(-(-n // 128), K // 128))
    return gemm.plan_fp8_gemm(a, b, *scales, None, BF16, target=target, invariant=invariant)


def half_fp8(
    m: int, n: int, target: Target, dtype: torch.dtype = BF16, invariant: bool = False
) -> gemm.Planned:
    x, b = empty(m, K, dtype=dtype), empty(n, K, dtype=FP8)
    return gemm.plan_fp8_weight_only(x, b, empty(n), None, target=target, invariant=invariant)


def half_block(
    m: int, n: int, target: Target, dtype: torch.dtype = BF16, invariant: bool = False
) -> gemm.Planned:
    x, b = empty(m, K, dtype=dtype), empty(n, K, dtype=FP8)
    scale = empty(-(-n // 128), K // 128)
    return gemm.plan_fp8_weight_only(x, b, scale, None, target=target, invariant=invariant)


def half_nvfp4(
    m: int, n: int, target: Target, dtype: torch.dtype = BF16, invariant: bool = False
) -> gemm.Planned:
    x, b = empty(m, K, dtype=dtype), empty(n, K // 2, dtype=U8)
    scale = empty(n, K // 16, dtype=FP8)
    return decode.plan_nvfp4_decode(
        x, b, scale, None, empty(), None, dtype, target=target, invariant=invariant
    )


def half_mxfp8(
    m: int, n: int, target: Target, dtype: torch.dtype = BF16, invariant: bool = False
) -> gemm.Planned:
    x, b = empty(m, K, dtype=dtype), empty(n, K, dtype=FP8)
    scale = empty(n, K // 32, dtype=U8)
    return decode.plan_mxfp8_decode(x, b, scale, None, dtype, target=target, invariant=invariant)


def nvfp4(m: int, n: int, target: Target, invariant: bool = False) -> gemm.Planned:
    a, b = empty(m, K // 2, dtype=U8), empty(n, K // 2, dtype=U8)
    scales = (empty(m, K // 16, dtype=FP8), empty(n, K // 16, dtype=FP8), empty(), empty())
    return gemm.plan_nvfp4_gemm(a, b, *scales, None, BF16, target=target, invariant=invariant)


def mxfp8(m: int, n: int, target: Target, invariant: bool = False) -> gemm.Planned:
    a, b = empty(m, K, dtype=FP8), empty(n, K, dtype=FP8)
    scales = (empty(m, K // 32, dtype=U8), empty(n, K // 32, dtype=U8))
    return gemm.plan_mxfp8_gemm(a, b, *scales, None, BF16, target=target, invariant=invariant)


PLANS: dict[Kind, Callable[..., gemm.Planned]] = {
    Kind.FP8: fp8,
    Kind.FP8_FAST: fp8_fast,
    Kind.FP8_BLOCK: fp8_block,
    Kind.HALF_FP8: half_fp8,
    Kind.HALF_BLOCK: half_block,
    Kind.HALF_NVFP4: half_nvfp4,
    Kind.HALF_MXFP8: half_mxfp8,
    Kind.NVFP4: nvfp4,
    Kind.MXFP8: mxfp8,
}


@dataclass(frozen=True)
class GemmCase(Case):
    """A case that knows what it is: the kind of product and its configuration."""

    kind: Kind = Kind.FP8
    config: GemmConfig | None = None


def gemm_cases(targets: tuple[Target, ...]) -> Iterator[GemmCase]:
    for target in targets:
        for kind, plan in PLANS.items():
            seen = set()
            for m, n in ((m, n) for n in WEIGHTS for m in ROWS if kind in all_configs(target)):
                for invariant in (False, True):
                    config = choose_without_tma(kind, m, n, K, target, invariant=invariant)
                    tile = (replace(config, split_k=1), config.split_k > 1)
                    if tile not in seen and not config.serial:
                        seen.add(tile)
                        yield gemm_case(kind, config, target, plan, m, n, invariant)


def serial_cases(targets: tuple[Target, ...]) -> Iterator[GemmCase]:
    """Every tile whose program adds the parts of K itself; one family, since it is one loop."""
    for target in targets:
        for kind, plan in PLANS.items():
            seen = set()
            for m in (m for m in ROWS if m > PARALLEL_ROWS and kind in all_configs(target)):
                config = choose(kind, m, WEIGHTS[1], K, target, invariant=True)
                if config.split == "serial" and config not in seen:
                    seen.add(config)
                    yield gemm_case(kind, config, target, plan, m, WEIGHTS[1], True)


def gemm_case(
    kind: Kind,
    config: GemmConfig,
    target: Target,
    plan: Callable[..., gemm.Planned],
    m: int,
    n: int,
    invariant: bool,
) -> GemmCase:
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    serial = config.serial
    return GemmCase(
        "gemm-serial" if serial else f"gemm-{kind.value}",
        target,
        f"{kind.value}-{tile}-{config.split_k}" if serial else f"{tile}-split{config.split_k}",
        lambda: without_tma(lambda: plan(m, n, target, invariant=invariant)),
        kind=kind,
        config=config,
    )


def without_tma(plan: Callable[[], gemm.Planned]) -> Launch:
    """What is planned for operands that TMA cannot read, but vectors can."""
    with patch.object(gemm, "tma_reads", lambda *_: False):
        return only(plan(), "gemm_")


def only(planned: gemm.Planned, name: str) -> Launch:
    """The launch of the kernel whose name starts so."""
    (launch,) = (one for one in planned[1] if one.kernel.__name__.startswith(name))
    return launch


CASES = [*gemm_cases(CUDA_TARGETS), *serial_cases(CUDA_TARGETS)]


def case_bytes(config: GemmConfig, kind: Kind) -> tuple[int, int]:
    """Bytes of x and of the weight in one K step."""
    x = {Kind.NVFP4: 0.5}.get(kind, 1 if kind in (*FP8_KINDS, Kind.MXFP8) else 2)
    w = 0.5 if kind in (Kind.NVFP4, Kind.HALF_NVFP4) else 1
    return int(config.block_m * config.block_k * x), int(config.block_n * config.block_k * w)


# Where the weight is decoded in the registers of the matrix instruction's layout, its copies to
# shared memory may be as narrow as that layout's pieces: 8 codes for wgmma (which takes registers
# only if the weight is the M side), 16 packed codes for mma.sync on triton 3.9.
NARROW_WEIGHTS = {
    **{(SM_90, kind): 64 for kind in (Kind.HALF_FP8, Kind.HALF_BLOCK, Kind.HALF_MXFP8)},
    **{(target, Kind.HALF_NVFP4): 64 for target in (SM_80, SM_89, SM_120)},
    (SM_90, Kind.HALF_NVFP4): 32,
}


def test_every_configuration_is_compiled():
    for target in CUDA_TARGETS:
        for kind, chosen in all_configs(target).items():
            compiled = {
                replace(case.config, split_k=1, serial=False)
                for case in CASES
                if (case.target, case.kind) == (target, kind)
            }
            elsewhere = kind in (Kind.FP32, *GEMVS)
            wanted = {config for config in chosen if not config.tma}
            assert elsewhere or compiled == wanted, (target.name, kind)


@pytest.mark.aot_cases(CASES)
def test_main_loop(case: GemmCase, compiled: Compiled):
    loop = sass.main_loop(compiled)
    sass.assert_matrix_instruction(compiled, instruction_of(case))
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    assert compiled.shared <= shared_bytes(case.config, case.kind, case.target)
    assert_operands_come_wide(case, loop)
    additions = additions_of(loop)
    promoted = case.target is SM_90 and case.kind is Kind.FP8
    assert bool(additions) == promoted, f"{additions} additions, promoted: {promoted}"
    assert_one_rounding_less(case, compiled, additions)
    if (case.target, case.kind) == (SM_120, Kind.MXFP8):
        sass.assert_opcode(compiled, r"^QMMA\.SF")
    if case.kind in (Kind.NVFP4, Kind.MXFP8) and case.target is SM_100:
        assert_scales_are_copied(case, compiled, loop)


def assert_scales_are_copied(
    case: GemmCase, compiled: Compiled, loop: list[sass.Instruction]
) -> None:
    """Scales of 128 rows reach tcgen05's memory by its own copies; those of fewer by registers.

    Besides, registers store the accumulator there, once. Scales are loaded ahead, as operands are.
    """
    assert any(i.base == "LDGSTS" and i.bits < 128 for i in loop)
    rows = {case.config.block_m, case.config.block_n}
    assert ("tcgen05.cp" in compiled.ptx) == (max(rows) >= 128)
    if min(rows) >= 128 and not case.config.serial:
        assert compiled.ptx.count("tcgen05.st") == 1


def instruction_of(case: GemmCase) -> str:
    """The matrix instruction of a case; with few rows on its M side Hopper's is a warp's own."""
    if case.target is SM_90 and case.config.block_m < 64 and not case.config.swap:
        return "HMMA"
    return MATRIX_INSTRUCTION[case.target][case.kind]


def additions_of(code: list[sass.Instruction]) -> int:
    """Plain fp32 additions of a thread; FADD2 makes two."""
    counted = sass.count(code)
    return counted["FADD"] + 2 * counted["FADD2"]


def assert_one_rounding_less(case: GemmCase, compiled: Compiled, in_loop: int) -> None:
    """Every build contracts scales with sums alike, or bits would depend on the tile.

    No addition is left beside multiply-adds, but for one of each sum where a program adds the parts
    itself, and one of each partial sum that the last program loads. NVFP4 parts come times a power
    of two, with which contraction changes no bit.
    """
    config, code = case.config, sass.instructions(compiled.sass)
    sums = config.block_m * config.block_n // (32 * config.num_warps)
    wanted = [sums if config.split == "serial" else 0]
    if config.split == "last":
        # In the code, that is: what runs once for each part may have been unrolled.
        wanted = [sum(i.bits for i in code if "STRONG.GPU" in i.opcode and i.base == "LDG") // 32]
        assert wanted[0] >= sums
    if case.kind is Kind.HALF_NVFP4:
        wanted.append(0)
    assert additions_of(code) - in_loop in wanted, case.name


def assert_operands_come_wide(case: GemmCase, loop: list[sass.Instruction]) -> None:
    """Copies of 128 bits bring the operands of a step; block scales may come in narrower ones."""
    threads = 32 * case.config.num_warps
    widths = [i.bits for i in loop if i.base == "LDGSTS"]
    x, w = case_bytes(case.config, case.kind)
    narrow = NARROW_WEIGHTS.get((case.target, case.kind), 128)
    if case.target is SM_90 and not case.config.swap:
        narrow = 128
    assert 16 * threads * widths.count(128) >= (x + w if narrow == 128 else x), (case.name, widths)
    copied = sum(threads * bits // 8 for bits in widths if bits >= narrow)
    assert copied >= x + w, (case.name, widths)


def fp32_cases() -> Iterator[Case]:
    for target in CUDA_TARGETS:
        for plan in (half_fp8, half_block, half_nvfp4, half_mxfp8):
            for m in (2, 128):
                name = f"{plan.__name__}-{m}"
                yield Case("gemm-fp32", target, name, fp32_launch(plan, m, 28672, target))
        name = f"{half_nvfp4.__name__}-serial"
        yield Case("gemm-fp32", target, name, fp32_launch(half_nvfp4, 128, 2048, target, True))


def fp32_launch(
    plan: Callable[..., gemm.Planned], m: int, n: int, target: Target, invariant: bool = False
) -> Callable[[], Launch]:
    return lambda: only(plan(m, n, target, FP32, invariant), "gemm_")


@pytest.mark.aot_cases(list(fp32_cases()))
def test_fp32_is_multiplied_as_fp32(case: Case, compiled: Compiled):
    used = sass.count(sass.instructions(compiled.sass))
    assert used["FFMA"] + used["FFMA2"] > 0  # FFMA2: two at a time, sm_100
    assert not set(used) & set(sass.MATRIX_OPCODES)
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)


def tail_cases() -> Iterator[Case]:
    """K that no step divides, fp16, and few rows: what the other cases leave out."""
    for target in CUDA_TARGETS:
        for plan in (half_fp8, half_block, half_nvfp4):
            name = f"{plan.__name__}-fp16"
            launch = lambda plan=plan, target=target: only(plan(2, 4096, target, FP16), "gemm_")  # noqa: E731
            yield Case("gemm-fp16", target, name, launch)


@pytest.mark.aot_cases(list(tail_cases()))
def test_fp16(case: Case, compiled: Compiled):
    sass.assert_no_spills(compiled)
    wanted = MATRIX_INSTRUCTION[case.target][Kind.HALF_FP8]
    if case.target is SM_90 and not case.plan().constants["SWAP"]:
        wanted = "HMMA"  # of x's few rows, which are the M side of a warp's own instruction
    sass.assert_matrix_instruction(compiled, wanted)


@pytest.mark.parametrize("target", HIP_TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("plan", [fp8, fp8_block, half_fp8, half_block, half_nvfp4, half_mxfp8])
def test_compiles_for_amd(target, plan):
    compiled = compile_launch(only(plan(64, 4096, target), "gemm_"), target)
    assert "v_mfma" in compiled.amdgcn
    assert not compiled.spills


@pytest.mark.parametrize("m", [1, 64, 2048])
@pytest.mark.parametrize("plan", [fp8, fp8_block])
@pytest.mark.parametrize("target", HIP_TARGETS, ids=lambda target: target.name)
def test_amd_multiplies_codes(target, plan, m):
    compiled = compile_launch(only(plan(m, 4096, target), "gemm_"), target)
    found = re.findall(r"\bv_mfma_f32_\d+x\d+x\d+_(\w+)", compiled.amdgcn)
    assert set(found) <= {"fp8_fp8", "f8f6f4"}
    assert found
    # Codes of CDNA 3's form are made of a checkpoint's four at a time, not byte by byte, which
    # takes about 11 instructions for each, most of them 16 bits wide.
    assert not re.search(r"\bv_\w+_[ub]16", compiled.amdgcn)
    assert not compiled.spills


@pytest.mark.parametrize("m", [1, 64, 2048])
def test_cdna_4_multiplies_mxfp8(m):
    compiled = compile_launch(only(mxfp8(m, 4096, GFX950), "gemm_"), GFX950)
    assert compiled.name == "gemm_native"
    found = re.findall(r"\bv_mfma_\w+", compiled.amdgcn)
    assert found
    assert all("scale" in name for name in found)
    assert not compiled.spills


@pytest.mark.parametrize("target", HIP_TARGETS, ids=lambda target: target.name)
@pytest.mark.parametrize("plan", [fp8_block, half_nvfp4])
def test_serial_parts_compile_for_amd(plan, target):
    launch = only(plan(128, 4096, target, invariant=True), "gemm_")
    compiled = compile_launch(launch, target)
    assert launch.constants["SPLIT"] == "serial"
    assert "v_mfma" in compiled.amdgcn
    assert not compiled.spills


def test_one_bucket_of_rows_shares_a_binary():
    # M is never a compile-time argument: one bucket, one set of constants.
    first, last = (only(fp8(m, 28672, SM_90), "gemm_") for m in (17, 32))
    assert first.constants == last.constants
    assert configs.bucket(17) == configs.bucket(32)
