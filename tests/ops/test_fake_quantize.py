"""Fake quantization on the CPU: bits, gradients, compilation, refusals."""

from typing import NamedTuple

import pytest
import torch

import mokernels  # noqa: F401  (registers the operators)
from mokernels import numerics
from mokernels.errors import ArgumentError
from tests.support.compare import assert_same_bits

OPS = torch.ops.mokernels
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SCALE, GLOBAL = torch.tensor(0.004), torch.tensor(0.0007)
AMAX = torch.tensor(3.0)


def fp8(x):
    multiplier, divisor = numerics.static_fp8_scales(SCALE)
    return numerics.dequantize_fp8(numerics.quantize_fp8(x, multiplier), divisor, x.dtype)


def nvfp4(x):
    return numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(x, GLOBAL), GLOBAL, x.dtype)


def coded(quantize, dequantize):
    return lambda x: dequantize(*quantize(x), x.dtype)


class Case(NamedTuple):
    """An operator's arguments after x, what it has to give, and the largest x that is kept."""

    extra: tuple
    expected: object
    largest: float | None = None


CASES = {
    "fp8": Case((SCALE,), fp8, 448 * 0.004),
    "fp8_per_token": Case((), coded(numerics.quantize_fp8_per_token, numerics.dequantize_fp8)),
    "nvfp4": Case((GLOBAL,), nvfp4, 2688 * 0.0007),
    "mxfp8": Case((), coded(numerics.quantize_mxfp8, numerics.dequantize_mxfp8)),
}
WEIGHTS = {
    "mxfp8": Case((), coded(numerics.quantize_mxfp8_weight, numerics.dequantize_mxfp8)),
    "fp8_weight": Case(
        ("tensor",), coded(numerics.quantize_fp8_tensor_weight, numerics.dequantize_fp8)
    ),
    "fp8_weight/channel": Case(
        ("channel",), coded(numerics.quantize_fp8_channel_weight, numerics.dequantize_fp8)
    ),
    "fp8_weight/block": Case(
        ("block",), coded(numerics.quantize_fp8_block_weight, numerics.dequantize_fp8)
    ),
    "fp8_weight/shared": Case(
        ("block", AMAX),
        coded(lambda w: numerics.quantize_fp8_block_weight(w, AMAX), numerics.dequantize_fp8),
        3.0,
    ),
    "fp8_weight/several": Case(
        ("tensor", AMAX),
        coded(lambda w: numerics.quantize_fp8_tensor_weight(w, AMAX), numerics.dequantize_fp8),
        3.0,
    ),
    "nvfp4_weight": Case((), coded(numerics.quantize_nvfp4_weight, numerics.dequantize_nvfp4)),
    "nvfp4_weight/shared": Case(
        (GLOBAL,),
        coded(lambda w: numerics.quantize_nvfp4_weight(w, GLOBAL), numerics.dequantize_nvfp4),
        2688 * 0.0007,
    ),
}
ALL = {**CASES, **WEIGHTS}


def operator(name):
    return getattr(OPS, f"fake_quantize_{name.partition('/')[0]}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 160), (2, 3, 32), (64,), (0, 64), (1, 1, 32)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_activations_come_back_as_numerics_dequantize_them(name, shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    result = operator(name)(x, *CASES[name].extra)
    assert_same_bits(result, CASES[name].expected(x))
    assert result.is_contiguous()
    if x.numel():
        assert 0 < (result - x).float().norm() < 0.3 * x.float().norm()


@pytest.mark.parametrize("name", ["fp8", "fp8_per_token"])
def test_fp8_activations_may_have_any_length(name):
    x = torch.randn(3, 131, dtype=torch.bfloat16)
    assert_same_bits(operator(name)(x, *CASES[name].extra), CASES[name].expected(x))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(130, 288), (7, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_come_back_as_the_export_stores_them(name, shape, dtype):
    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype)
    weight[0, :32] = 0
    case = WEIGHTS[name]
    assert_same_bits(operator(name)(weight, *case.extra), case.expected(weight))
    empty = weight[:0]
    assert operator(name)(empty, *case.extra).shape == empty.shape


@pytest.mark.parametrize("name", ALL)
def test_strides_do_not_matter(name):
    torch.manual_seed(2)
    x = torch.randn(128, 96).bfloat16()
    wide = torch.zeros(128, 192, dtype=x.dtype)
    wide[:, ::2] = x
    expected = operator(name)(x, *ALL[name].extra)
    for view in (wide[:, ::2], x.t().contiguous().t()):
        result = operator(name)(view, *ALL[name].extra)
        assert_same_bits(result, expected)
        assert result.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_one_where_nothing_saturates(name, dtype):
    torch.manual_seed(3)
    case = ALL[name]
    x = (2 * torch.randn(32, 64)).to(dtype).requires_grad_()
    grad = torch.randn(32, 64).to(dtype)
    operator(name)(x, *case.extra).backward(grad)
    kept = torch.ones_like(grad, dtype=torch.bool)
    if case.largest is not None:
        kept = x.detach().abs().float() <= case.largest
        assert 0 < kept.sum() < kept.numel()
    assert_same_bits(x.grad, torch.where(kept, grad, 0))


def test_a_calibrated_amax_does_not_saturate():
    # Whatever is lost when the amax becomes the stored scale, and the scale the largest value.
    for seed in range(200):
        amax = torch.rand((), generator=torch.Generator().manual_seed(seed)) * 10
        for name, divisor in (("fp8", 448.0), ("nvfp4", 2688.0)):
            x = torch.stack([amax, amax * 1.01]).repeat(8).requires_grad_()
            operator(name)(x, numerics.elements.divide(amax, divisor)).sum().backward()
            assert x.grad.tolist() == [1.0, 0.0] * 8


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_a_nan_is_not_hidden_from_the_gradient(name):
    x = torch.zeros(16)
    x[3] = torch.nan
    x.requires_grad_()
    y = operator(name)(x, *CASES[name].extra)
    assert y[3].isnan()
    y.square().sum().backward()
    assert x.grad[3].isnan()


@pytest.mark.parametrize("name", ALL)
def test_opcheck(name):
    torch.manual_seed(4)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    for given in (x, x.clone().requires_grad_(), x.t().contiguous().t()):
        torch.library.opcheck(operator(name).default, (given, *ALL[name].extra))


def test_it_compiles_without_graph_breaks():
    def loss(x, w):
        total = x.new_zeros(())
        for name, case in CASES.items():
            total = total + (operator(name)(x, *case.extra) @ w.t()).square().mean()
        for name, case in WEIGHTS.items():
            total = total + (x @ operator(name)(w, *case.extra).t()).square().mean()
        return total

    torch.manual_seed(5)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5):
        tensors = torch.randn(rows, 64), torch.randn(32, 64)
        results = []
        for run in (loss, compiled):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            run(*leaves).backward()
            results.append([leaf.grad for leaf in leaves])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


X = torch.zeros(2, 64)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("fp8", (X.double(), SCALE), r"x is float64 \[2, 64\], wanted bfloat16, float16 or float3"),
        ("fp8", (X, torch.ones(2)), r"scale is float32 \[2\], wanted shape \[\]"),
        ("fp8_per_token", (X.int(),), "x is int32.*Convert it first"),
        ("nvfp4", (X[:, :40], GLOBAL), "holds 40 elements, wanted a multiple of 16. Pad it"),
        ("nvfp4", (X, GLOBAL.double()), "global_scale is float64.*wanted float32"),
        ("mxfp8", (X[:, :48],), "holds 48 elements, wanted a multiple of 32"),
        ("fp8_weight", (X[0],), r"weight is float32 \[64\], wanted \[N, K\]"),
        ("fp8_weight", (X, "row"), "granularity is 'row', wanted one of tensor, channel, block"),
        (
            "fp8_weight",
            (X, "channel", AMAX),
            "an amax was given.*wanted 'tensor' or 'block'",
        ),
        ("fp8_weight", (X, "block", torch.ones(3)), r"amax is float32 \[3\], wanted shape \[\]"),
        ("nvfp4_weight", (X[:, :8],), "wanted a multiple of 16"),
        ("nvfp4_weight", (X, torch.ones(2)), r"global_scale is float32 \[2\]"),
    ],
)
def test_refusals_say_what_was_wrong(name, args, message):
    with pytest.raises(ArgumentError, match=message) as error:
        operator(name)(*args)
    assert str(error.value).startswith(f"mokernels::fake_quantize_{name}: ")
