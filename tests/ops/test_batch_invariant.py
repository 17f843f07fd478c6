"""Batch invariance on the CPU: a row of a batch equals the row alone, bit for bit."""

from __future__ import annotations

import pytest
import torch

from mokernels import numerics
from mokernels.invariance import batch_invariant
from mokernels.numerics import product
from tests.support.compare import assert_same_bits

OPS = torch.ops.mokernels
N, K = 37, 160
ROWS = (1, 2, 3, 17, 64, 130, 1024)
LOOKED_AT = (0, 1, 2, *range(16, 1024, 31))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operators():
    """Every product operator by name, as a function of activations in fp32 [M, K]."""
    w = normal(N, K, seed=1)
    bias, one, g = normal(N, seed=2), torch.tensor(0.01), torch.tensor(4.0 / (6 * 448))
    fp8, channel = numerics.quantize_fp8_tensor_weight(w), numerics.quantize_fp8_channel_weight(w)
    nvfp4, mxfp8 = numerics.quantize_nvfp4_weight(w), numerics.quantize_mxfp8_weight(w)
    f32 = "float32"

    def fp8_gemm(x):
        codes, scale = numerics.quantize_fp8_per_token(x)
        return OPS.fp8_gemm(codes, channel[0], scale, channel[1], bias, f32)

    def nvfp4_gemm(x):
        codes, scale = numerics.quantize_nvfp4(x, g)
        return OPS.nvfp4_gemm(codes, nvfp4[0], scale, nvfp4[1], g, nvfp4[2], bias, f32)

    def mxfp8_gemm(x):
        codes, scale = numerics.quantize_mxfp8(x)
        return OPS.mxfp8_gemm(codes, mxfp8[0], scale, mxfp8[1], bias, f32)

    return {
        "fp8_gemm": fp8_gemm,
        "nvfp4_gemm": nvfp4_gemm,
        "mxfp8_gemm": mxfp8_gemm,
        "fp8_weight_only_gemm": lambda x: OPS.fp8_weight_only_gemm(x, *channel, bias),
        "nvfp4_weight_only_gemm": lambda x: OPS.nvfp4_weight_only_gemm(x, *nvfp4, bias),
        "mxfp8_weight_only_gemm": lambda x: OPS.mxfp8_weight_only_gemm(x, *mxfp8, bias),
        "fp8_linear": lambda x: OPS.fp8_linear(x, *fp8, one, bias),
        "fp8_per_token_linear": lambda x: OPS.fp8_per_token_linear(x, *channel, bias),
        "fp8_block_linear": lambda x: OPS.fp8_block_linear(x, *fp8, bias),
        "nvfp4_linear": lambda x: OPS.nvfp4_linear(x, *nvfp4, g, bias),
        "mxfp8_linear": lambda x: OPS.mxfp8_linear(x, *mxfp8, bias),
    }


OPERATORS = operators()
every_operator = pytest.mark.parametrize("name", OPERATORS)


def differing(run, x):
    """The batches (numbers of rows) in which some row has not the bits that it has alone."""
    alone = {row: run(x[row : row + 1]) for row in LOOKED_AT}
    batches = {m: run(x[:m]) for m in ROWS}
    return [
        m
        for m, batch in batches.items()
        if not all(torch.equal(batch[row : row + 1], alone[row]) for row in alone if row < m)
    ]


def test_every_product_operator_is_here():
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("mokernels::") for name in names if name.startswith("mokernels::")}
    assert {name for name in ours if name.endswith(("_gemm", "_linear"))} == set(OPERATORS)


@every_operator
def test_a_row_of_a_batch_is_the_row_alone(name):
    with batch_invariant():
        assert differing(OPERATORS[name], normal(max(ROWS), K)) == []


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 7), (129, 333), (64, 1000), (300, 4099)])
def test_odd_shapes(n, k):
    x, weight, scale = normal(300, k), normal(n, k, seed=1).to(torch.float8_e4m3fn), torch.ones(n)
    with batch_invariant():
        batch = OPS.fp8_weight_only_gemm(x, weight, scale)
        for row in (0, 1, 2, 7, 150, 299):
            alone = OPS.fp8_weight_only_gemm(x[row : row + 1].clone(), weight, scale)
            assert_same_bits(batch[row : row + 1], alone)
            some = OPS.fp8_weight_only_gemm(x[row:], weight, scale)
            assert_same_bits(some[:1], alone)


@every_operator
def test_values_are_those_of_the_usual_product(name):
    # Both add K exact products in some order of fp32 additions: see tests/kernels/products.py.
    x = normal(40, K)
    usual = OPERATORS[name](x)
    with batch_invariant():
        mine = OPERATORS[name](x)
    magnitude = x.abs().amax(-1, keepdim=True) * normal(N, K, seed=1).abs().sum(-1)
    allowed = 2 * (K + 16) * 2.0**-24 * (2 * magnitude + normal(N, seed=2).abs())
    assert ((mine - usual).abs() <= allowed).all()


def test_leading_dimensions_and_no_rows_at_all():
    with batch_invariant():
        for name, run in OPERATORS.items():
            x = normal(2, 3, 5, K)
            rows = run(x.reshape(30, K))
            assert_same_bits(run(x), rows.reshape(2, 3, 5, N))
            assert_same_bits(run(x[0, 0, 0]), rows[0])
            assert run(x[:0]).shape == (0, 3, 5, N), name


def other_order_for_batches(a, b):
    """A product as libraries make them: the order of addition follows the number of rows."""
    products = a[..., None, :] * b
    if a.shape[0] == 1:
        return products.sum(-1)
    return products[..., ::2].sum(-1) + products[..., 1::2].sum(-1)


def test_the_comparison_can_fail(monkeypatch):
    monkeypatch.setattr(product, "linear", other_order_for_batches)
    run, x = OPERATORS["fp8_weight_only_gemm"], normal(max(ROWS), K)
    assert differing(run, x) == [m for m in ROWS if m > 1]
    with batch_invariant():
        assert differing(run, x) == []


@pytest.mark.parametrize("rows", [2, 3, 130])
@pytest.mark.parametrize("name", ["fp8_per_token", "fp8_per_block", "nvfp4", "mxfp8"])
def test_quantizers_need_no_mode(name, rows):
    x = normal(rows, 288)
    extra = (torch.tensor(4.0 / (6 * 448)),) if name == "nvfp4" else ()
    quantize = getattr(OPS, f"quantize_{name}")
    batch = quantize(x, *extra)
    for row in (0, rows - 1):
        for whole, alone in zip(batch, quantize(x[row : row + 1], *extra), strict=True):
            assert_same_bits(whole[row : row + 1].view(torch.uint8), alone.view(torch.uint8))
