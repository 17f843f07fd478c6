"""What compilers make of NVFP4 weights that are decoded by words: work and traffic for a weight."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from mokernels.ops.launch import decode
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import CUDA_TARGETS, SM_90, Target
from tests.support import sass
from tests.support.aot import Case, Compiled, compile_launch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = (2, 32, 64, 2048)
INTEGER = ("LOP3", "SHF", "PRMT", "IADD3", "LEA", "SEL", "ISETP")
"""Of 64 lanes a clock and processor; multiplications have the floats' unit instead."""
INTEGER_FOR_A_WEIGHT = 2.0
"""With few rows on Hopper; what permutes x is among them."""
INSTRUCTIONS_FOR_A_WEIGHT = 5.5
"""Of a step, on Hopper; decoding byte by byte took 8 to 10."""


def empty(*shape: int, dtype: torch.dtype = FP32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def product(
    m: int, target: Target, dtype: torch.dtype = BF16, k: int = 4096, invariant: bool = False
) -> Launch:
    # Many rows have their weight decoded first, or else as batch invariance has it.
    n, invariant = 28672, invariant or m > 64
    weight = (empty(n, k // 2, dtype=torch.uint8), empty(n, k // 16, dtype=torch.float8_e4m3fn))
    _, (launch, *_) = decode.plan_nvfp4_decode(
        empty(m, k, dtype=dtype), *weight, empty(), empty(), None, BF16,
        target=target, invariant=invariant,
    )  # fmt: skip
    return launch


def cases() -> Iterator[Case]:
    for target in CUDA_TARGETS:
        for m in ROWS:
            for dtype in (BF16, FP16):
                name = f"{str(dtype)[6:]}-{m}"
                yield Case("words", target, name, partial(product, m, target, dtype))


CASES = list(cases())


def weights_of(launch: Launch) -> float:
    """Weights that a thread decodes in a step if each is decoded once."""
    tile = launch.constants["BLOCK_N"] * launch.constants["BLOCK_K"]
    return tile / (32 * launch.num_warps)


@pytest.mark.aot_cases(CASES)
def test_decoded_weights_stay_in_their_thread(case: Case, compiled: Compiled):
    loop = sass.count(sass.main_loop(compiled))
    weights = weights_of(case.plan())
    assert not loop["SHFL"], loop
    # What is stored is x, in its order of K, for wgmma and tcgen05 to read it from shared memory; a
    # store of decoded weights moves 8 of them at most.
    assert loop["STS"] + loop["STSM"] <= weights / 8, loop


@pytest.mark.aot_cases([case for case in CASES if case.target is SM_90])
def test_instructions_for_a_weight(case: Case, compiled: Compiled):
    launch, loop = case.plan(), sass.main_loop(compiled)
    weights = weights_of(launch)
    assert len(loop) / weights <= INSTRUCTIONS_FOR_A_WEIGHT, sass.count(loop)
    if launch.constants["BLOCK_M"] == 16:
        used = sass.count(loop)
        integer = sum(used[opcode] for opcode in INTEGER) / weights
        assert integer <= INTEGER_FOR_A_WEIGHT, f"{integer:.2f} of {used}"


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_few_rows_on_hopper_take_neither_barriers_of_warps_nor_shared_memory(dtype):
    launch = product(16, SM_90, dtype)
    compiled = compile_launch(launch, SM_90)
    loop = sass.main_loop(compiled)
    sass.assert_matrix_instruction(compiled, "HMMA")
    sass.assert_no_spills(compiled)
    used = sass.count(loop)
    assert not used["STS"] + used["STSM"] + used["SHFL"], used
    # Words and x are read by 16 bytes; scales, of two blocks each, and the barrier's state are not.
    weights = weights_of(launch)
    wide = sum(i.base == "LDS" and i.bits == 128 for i in loop)
    assert wide >= weights / 32
    assert used["LDS"] <= wide + weights / 32 + 4, used


def test_with_batch_invariance_all_rows_have_one_order():
    launches = [product(m, SM_90, invariant=True) for m in ROWS]
    assert {one.constants["FORMAT"] for one in launches} == {"nvfp4x2"}
    assert product(2, SM_90).constants["FORMAT"] == "nvfp4x8"
