"""NVFP4 weights by words: alignment, and the order of K, which x and the weight have to share."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mokernels.numerics as numerics
from mokernels.ops.configs import Kind, bucket
from mokernels.ops.gemm_config import GemmConfig
from mokernels.ops.launch.decode import plan_nvfp4_decode
from mokernels.ops.launch.plan import run
from mokernels.ops.table_files import Key
from mokernels.ops.target import SM_80, SM_90, target_of
from mokernels.ops.tuned import forced

BF16, FP16 = torch.bfloat16, torch.float16
N, K = 24, 336
"""More than two spans of 128, of which the last is cut."""


def operands(device, m, dtype=BF16, k=K):
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(0, 256, (N, k // 2), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(N, k // 16, generator=generator) + 0.3).to(torch.float8_e4m3fn)
    # Small integers: every sum is exact, in whatever order.
    x = torch.randint(-3, 4, (m, k), generator=generator).to(dtype)
    return [tensor.to(device) for tensor in (x, codes, scale.float().mul(8).round().div(8).to(
        torch.float8_e4m3fn))]  # fmt: skip


def product(device, x, codes, scale, target, **options):
    if device.type == "cuda":
        target = target_of(device)
    one = torch.ones((), device=device)
    return run(
        plan_nvfp4_decode(x, codes, scale, None, one, None, torch.float32, target=target, **options)
    )


def expected(x, codes, scale):
    one = torch.ones((), device=x.device)
    return x.double() @ numerics.dequantize_nvfp4(codes, scale, one).double().T


@pytest.mark.parametrize("target", [SM_80, SM_90], ids=lambda target: target.name)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("m", [2, 40])
@pytest.mark.parametrize("k", [16, 64, K])
def test_exact(device, target, dtype, m, k):
    given = operands(device, m, dtype, k)
    assert torch.equal(product(device, *given, target).double(), expected(*given))


@pytest.mark.parametrize("block_k", [64, 128, 256])
@pytest.mark.parametrize("swap", [False, True])
def test_any_step(device, block_k, swap):
    given = operands(device, 5)
    config = GemmConfig(16, 64, block_k, 4, 3, swap)
    with forced(Key(Kind.HALF_NVFP4, bucket(5), N, K), config):
        assert torch.equal(product(device, *given, SM_90).double(), expected(*given))


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_rows_between_words_give_the_same_bits(device, offset):
    x, codes, scale = operands(device, 3)
    x = x * 0.37
    aligned = product(device, x, codes, scale, SM_90)
    wide = torch.zeros(N, K // 2 + offset + 1, dtype=torch.uint8, device=device)
    wide[:, offset : offset + K // 2] = codes
    view = wide[:, offset : offset + K // 2]
    assert torch.equal(product(device, x, view, scale, SM_90), aligned)
    alone = view[:1]
    assert torch.equal(product(device, x, alone, scale[:1], SM_90), aligned[:, :1])


@pytest.mark.parametrize("code", [0, 8], ids=["zero", "minus zero"])
def test_special_codes_and_scales(device, code):
    x, codes, scale = operands(device, 2)
    codes.fill_(code | code << 4)
    scale.view(torch.uint8)[3, 0] = 0x7F
    result = product(device, x, codes, scale, SM_90)
    assert torch.isnan(result[:, 3]).all()
    assert (result.nan_to_num() == 0).all()


def test_fewer_processors_split_k_alike(device):
    given = operands(device, 16)
    whole = product(device, *given, replace(SM_90, processors=1))
    assert torch.equal(whole, product(device, *given, SM_90))
