"""What the compiler makes of products by TMA: instructions, registers, shared memory.

The configurations that are chosen, with the results that cost most at the end of a tile, and others
that the kernel takes: block scales, and Blackwell. Weights that are decoded first are bf16 here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from mokernels.ops.config_limits import config_ok, shared_bytes
from mokernels.ops.configs import GemmConfig, Kind, all_configs
from mokernels.ops.gemm_config import DECODED_FIRST
from mokernels.ops.launch import decode, gemm
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import CUDA_TARGETS, SM_90, SM_100, Target
from tests.aot.test_gemm import (
    BF16,
    FP8,
    FP32,
    PLANS,
    U8,
    GemmCase,
    additions_of,
    assert_scales_are_copied,
    empty,
    only,
)
from tests.support import sass
from tests.support.aot import Compiled, compile_launch

K = 4096
COLUMNS = (28672, 5120)
"""N that 128x256 tiles suit, and one that they do not (tile_by_tma)."""
WITH_TMA = [target for target in CUDA_TARGETS if target.has_tma]
CHOSEN = [
    (target, kind, config)
    for target in WITH_TMA
    for kind, configs in all_configs(target).items()
    for config in configs
    if config.tma
]
TALL = GemmConfig(256, 128, 64, 8, 4, tma=True)
SQUARE = GemmConfig(128, 128, 128, 8, 4, tma=True)
POSSIBLE = [
    (SM_90, Kind.FP8_BLOCK, SQUARE),
    (SM_90, Kind.HALF_NVFP4, TALL),
    # Parts of K, added by the last program and by a second launch.
    (SM_90, Kind.FP8, GemmConfig(64, 64, 128, 4, 6, promote=128, split_k=2, tma=True)),
    (SM_90, Kind.FP8, GemmConfig(128, 64, 128, 8, 6, promote=128, split_k=4, tma=True)),
    (SM_90, Kind.FP8_BLOCK, GemmConfig(64, 64, 128, 4, 4, split_k=2, tma=True)),
    (SM_100, Kind.FP8, SQUARE),
    (SM_100, Kind.FP8_BLOCK, SQUARE),
]
OF_FP8 = {SM_90: "QGMMA", SM_100: "UTCQMMA"}
SCALED_BY_THE_UNIT = (Kind.NVFP4, Kind.MXFP8)
OF_16_BITS = {SM_90: "HGMMA", SM_100: "UTCHMMA"}


def launch_of(target: Target, kind: Kind, config: GemmConfig, n: int, out: torch.dtype) -> Launch:
    if kind in DECODED_FIRST:
        return decoded_launch(target, kind, config, n, out)
    if kind in SCALED_BY_THE_UNIT:
        return scaled_launch(target, kind, config, n, out)
    a, b = empty(2048, K, dtype=FP8), empty(n, K, dtype=FP8)
    scales, bias = (empty(2048), empty(n)), empty(n, dtype=BF16)
    if kind is Kind.FP8_BLOCK:
        scales, bias = (empty(2048, K // 128), empty(n // 128, K // 128)), None
    with patch.object(gemm, "choose", lambda *_: config):
        planned = gemm.plan_fp8_gemm(a, b, *scales, bias, out, target=target)
    return only(planned, "gemm_persistent")


def decoded_launch(
    target: Target, kind: Kind, config: GemmConfig, n: int, out: torch.dtype
) -> Launch:
    x, bias = empty(2048, K, dtype=BF16), empty(n, dtype=BF16)
    with patch.object(decode, "choose", lambda *_: config):
        if kind is Kind.HALF_NVFP4:
            weight = (empty(n, K // 2, dtype=torch.uint8), empty(n, K // 16, dtype=FP8))
            tail = (empty(), empty(n), bias, out)
            planned = decode.plan_nvfp4_decode(x, *weight, *tail, target=target)
        else:
            weight = (empty(n, K, dtype=FP8), empty(n, K // 32, dtype=torch.uint8))
            # Without scales nothing would take the bias into a multiply-add.
            planned = decode.plan_mxfp8_decode(x, *weight, None, out, target=target)
    return only(planned, "gemm_persistent")


def scaled_launch(
    target: Target, kind: Kind, config: GemmConfig, n: int, out: torch.dtype
) -> Launch:
    with patch.object(gemm, "choose", lambda *_: config):
        if kind is Kind.NVFP4:
            codes = (empty(2048, K // 2, dtype=U8), empty(n, K // 2, dtype=U8))
            scales = (empty(2048, K // 16, dtype=FP8), empty(n, K // 16, dtype=FP8))
            given = (*codes, *scales, empty(), empty(n), empty(n, dtype=BF16), out)
            return only(gemm.plan_nvfp4_gemm(*given, target=target), "gemm_persistent")
        codes = (empty(2048, K, dtype=FP8), empty(n, K, dtype=FP8))
        scales = (empty(2048, K // 32, dtype=U8), empty(n, K // 32, dtype=U8))
        # Without scales nothing would take the bias into a multiply-add.
        planned = gemm.plan_mxfp8_gemm(*codes, *scales, None, out, target=target)
        return only(planned, "gemm_persistent")


def cases() -> Iterator[GemmCase]:
    for target, kind, config in (*CHOSEN, *POSSIBLE):
        seen = set()
        for n, out in ((n, out) for n in COLUMNS for out in (BF16, FP32)):
            launch = launch_of(target, kind, config, n, out)
            height, width = launch.constants["BLOCK_M"], launch.constants["BLOCK_N"]
            if (height, width, out) not in seen:
                seen.add((height, width, out))
                tile = f"{height}x{width}x{config.block_k}"
                yield GemmCase(
                    "gemm-persistent",
                    target,
                    f"{kind.value}-{tile}-{str(out).removeprefix('torch.')}",
                    lambda launch=launch: launch,
                    kind=kind,
                    config=replace(
                        config, block_m=height, block_n=width, num_stages=launch.num_stages
                    ),
                )


CASES = list(cases())


@pytest.mark.aot_cases(CASES)
def test_main_loop(case: GemmCase, compiled: Compiled):
    assert compiled.name == "gemm_persistent"
    loop = sass.main_loop(compiled)
    used = sass.count(loop)
    scaled = case.kind in SCALED_BY_THE_UNIT
    if scaled:
        wanted = "UTCQMMA" if case.kind is Kind.MXFP8 else "UTCOMMA"
        assert_scales_are_copied(case, compiled, loop)
    else:
        wanted = (OF_16_BITS if case.kind in DECODED_FIRST else OF_FP8)[case.target]
    sass.assert_matrix_instruction(compiled, wanted)
    assert "cp.async.bulk.tensor" in compiled.ptx
    assert used["UTMALDG"] >= 2, used
    assert bool(used["LDGSTS"]) == scaled, used
    sass.assert_no_spills(compiled)
    sass.assert_fits(compiled)
    config = case.config
    assert config_ok(config, case.kind, case.target)
    assert compiled.shared <= shared_bytes(config, case.kind, case.target)
    # The loop holds the end of a tile too, where scales and bias are contracted, as in the kernels
    # that load from pointers: an addition that is left promotes.
    elements = config.block_m * config.block_n // (32 * config.num_warps)
    assert additions_of(loop) == (elements if config.promote else 0), used


@pytest.mark.parametrize("kind", DECODED_FIRST, ids=lambda kind: kind.value)
def test_a_weight_is_decoded_by_wide_accesses(kind):
    decode_weight, product = PLANS[kind](2048, COLUMNS[0], SM_90)[1]
    assert product.kernel.__name__ == "gemm_persistent"
    compiled = compile_launch(decode_weight, SM_90)
    code = sass.instructions(compiled.sass)
    assert {i.bits for i in code if i.base == "STG"} == {128}
    # Codes of NVFP4 come by 8 bytes; block scales by one, as few as they are.
    assert {i.bits for i in code if i.base == "LDG"} <= {8, 64, 128}
    sass.assert_no_spills(compiled)


def test_wide_and_narrow_tiles_are_compiled():
    # An fp32 result is narrow, whatever N is.
    widths = {(case.kind, case.config.block_n) for case in CASES if case.target is SM_90}
    assert {(Kind.FP8, 128), (Kind.FP8_FAST, 128), (Kind.FP8_FAST, 256)} <= widths
    assert {(kind, width) for kind in DECODED_FIRST for width in (128, 256)} <= widths
