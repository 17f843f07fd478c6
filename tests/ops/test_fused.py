"""Operators that compute activations and quantize them, on the CPU: every bit of the eager modules.

What the modules compute is written out here by hand, operation for operation.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import mokernels  # noqa: F401  (registers the operators)
from mokernels import numerics
from mokernels.errors import ArgumentError
from mokernels.ops.quantize import QUANTIZERS
from tests.support.compare import assert_same_bits

OPS = torch.ops.mokernels
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SCALE = torch.tensor(0.003)
EXTRA = {"fp8": (SCALE,), "nvfp4": (SCALE,), "nvfp4_to_bf16": (SCALE,)}
EPS = 1e-5

every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def extra(name: str) -> tuple[Tensor, ...]:
    return EXTRA.get(name, ())


def operator(name: str):
    return getattr(OPS, name).default


def quantized(name: str, x: Tensor) -> tuple[Tensor, ...]:
    """What the definition makes of x."""
    if name == "fp8":
        return (numerics.quantize_fp8(x, numerics.static_fp8_scales(SCALE)[0]),)
    if name == "nvfp4":
        return numerics.quantize_nvfp4(x, SCALE)
    if name == "nvfp4_to_bf16":
        codes, scale = numerics.quantize_nvfp4(x, SCALE)
        return (numerics.dequantize_nvfp4(codes, scale, torch.tensor(1.0), torch.bfloat16),)
    if name == "mxfp8_to_bf16":
        return (numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x), torch.bfloat16),)
    return getattr(numerics, f"quantize_{name}")(x)


def assert_results(results, expected: tuple[Tensor, ...]) -> None:
    results = results if isinstance(results, tuple) else (results,)
    for result, wanted in zip(results, expected, strict=True):
        assert result.is_contiguous()
        assert_same_bits(result, wanted.contiguous())


def llama_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    input_dtype = hidden.dtype
    hidden = hidden.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(variance + EPS)
    return weight * hidden.to(input_dtype)


def olmo2_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    input_dtype = hidden.dtype
    hidden = hidden.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(variance + EPS)
    return (weight * hidden).to(input_dtype)


def gemma_norm(x: Tensor, weight: Tensor) -> Tensor:
    output = x.float()
    output = output * torch.rsqrt(output.pow(2).mean(-1, keepdim=True) + EPS)
    output = output * (1.0 + weight.float())
    return output.type_as(x)


NORMS = {
    "cast_then_scale": llama_norm,
    "scale_then_cast": olmo2_norm,
    "one_plus_weight": gemma_norm,
}
ACTIVATIONS = {
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_dtype
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("style", NORMS)
@every_quantizer
def test_norms_are_those_of_the_modules(name, style, weight_dtype, dtype):
    x, residual = draw(2, 5, 288, dtype=dtype), draw(2, 5, 288, seed=1, dtype=dtype)
    weight = draw(288, seed=2, dtype=weight_dtype)
    expected = quantized(name, NORMS[style](x, weight))
    given = (weight, EPS, style, *extra(name))
    assert_results(operator(f"rms_norm_quantize_{name}")(x, *given), expected)
    total = residual + x
    expected = quantized(name, NORMS[style](total, weight))
    results = operator(f"add_rms_norm_quantize_{name}")(x, residual, *given)
    assert_results(results, (total, *expected))


@every_dtype
def test_scale_then_cast_is_the_norm_of_torch(dtype):
    x, weight = draw(7, 320, dtype=dtype), draw(320, seed=1, dtype=dtype)
    expected = torch.nn.functional.rms_norm(x, (320,), weight, EPS)
    codes, scale = OPS.rms_norm_quantize_fp8_per_token(x, weight, EPS, "scale_then_cast")
    assert_results((codes, scale), numerics.quantize_fp8_per_token(expected))


@every_dtype
def test_the_styles_differ(dtype):
    # A test of the tests: were the styles the same, no mistake between them could be seen.
    x, weight = draw(64, 256, dtype=dtype), draw(256, seed=1, dtype=dtype)
    results = [norm(x, weight) for norm in NORMS.values()]
    assert not torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[1]) == (dtype == torch.float32)


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_quantizer
def test_gated_activations_are_those_of_the_modules(name, activation, dtype):
    # The halves of one tensor, as a fused gate and up projection returns them.
    gate, up = draw(3, 4, 320, dtype=dtype).chunk(2, dim=-1)
    expected = quantized(name, ACTIVATIONS[activation](gate) * up)
    results = operator(f"gated_quantize_{name}")(gate, up, activation, *extra(name))
    assert_results(results, expected)


def test_the_multiplier_is_used_when_it_is_given():
    x, weight, scale = draw(3, 64), draw(64, seed=1), torch.tensor(0.0123)
    multiplier, _ = numerics.static_fp8_scales(scale)
    given, style = (x, weight, EPS), "cast_then_scale"
    derived = OPS.rms_norm_quantize_fp8(*given, style, scale)
    assert_same_bits(OPS.rms_norm_quantize_fp8(*given, style, scale, multiplier), derived)
    halved = OPS.rms_norm_quantize_fp8(*given, style, scale, multiplier=multiplier / 2)
    assert not torch.equal(halved.float(), derived.float())
    _, added = OPS.add_rms_norm_quantize_fp8(x * 0, x, weight, EPS, style, scale, multiplier)
    assert_same_bits(added, derived)


def calls(name: str, *lead: int, k: int = 96, dtype: torch.dtype = torch.bfloat16):
    """A call of every producer with this quantizer: (operator, arguments)."""
    x, other, weight = draw(*lead, k, dtype=dtype), draw(*lead, k, dtype=dtype), draw(k)
    tail = (weight, 1e-6, "cast_then_scale", *extra(name))
    return {
        "rms_norm": (operator(f"rms_norm_quantize_{name}"), (x, *tail)),
        "add_rms_norm": (operator(f"add_rms_norm_quantize_{name}"), (x, other, *tail)),
        "gated": (operator(f"gated_quantize_{name}"), (x, other, "silu", *extra(name))),
    }


@pytest.mark.parametrize("lead", [(), (0,), (1,), (2, 0), (2, 1, 3)], ids=str)
@every_quantizer
def test_leading_dimensions_and_fake_results(name, lead):
    for op, args in calls(name, *lead).values():
        results = op(*args)
        fakes = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
        results, fakes = (r if isinstance(r, tuple) else (r,) for r in (results, fakes))
        for result, fake in zip(results, fakes, strict=True):
            assert result.shape[: len(lead)] == lead
            assert (result.shape, result.dtype) == (fake.shape, fake.dtype)
            assert result.is_contiguous()
            assert fake.is_contiguous()


@every_quantizer
def test_strides_do_not_matter(name):
    for op, args in calls(name, 4, 6).values():
        expected = op(*args)
        expected = expected if isinstance(expected, tuple) else (expected,)
        turned = [
            a.transpose(0, 1).contiguous().transpose(0, 1)
            if isinstance(a, Tensor) and a.dim() == 3
            else a
            for a in args
        ]
        assert_results(op(*turned), expected)


@pytest.mark.parametrize("producer", ["rms_norm", "add_rms_norm", "gated"])
@every_quantizer
def test_opcheck(name, producer):
    op, args = calls(name, 3, 4)[producer]
    torch.library.opcheck(op, args)


X = draw(2, 64)
W = torch.ones(64)
STYLE = (1e-6, "cast_then_scale")


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("rms_norm_quantize_fp8", (X.double(), W, *STYLE, SCALE), "x is float64.*wanted bfloat16"),
        ("rms_norm_quantize_mxfp8", (X[0, 0], W[:1], *STYLE), "at least one dimension"),
        (
            "rms_norm_quantize_fp8",
            (X, W[:63], *STYLE, SCALE),
            r"weight is float32 \[63\], wanted shape \[64\] in bfloat16",
        ),
        ("rms_norm_quantize_mxfp8", (X, W.int(), *STYLE), r"weight is int32 \[64\], wanted shape"),
        (
            "rms_norm_quantize_fp8",
            (X, W, *STYLE, torch.ones(2)),
            r"scale is float32 \[2\], wanted shape \[\]",
        ),
        (
            "rms_norm_quantize_fp8_per_token",
            (X, W, 1e-6, "llama"),
            "style is 'llama', wanted one of cast_then_scale, scale_then_cast, one_plus_weight",
        ),
        (
            "add_rms_norm_quantize_nvfp4",
            (X, X.half(), W, *STYLE, SCALE),
            r"x is bfloat16 \[2, 64\] and residual is float16 \[2, 64\], wanted the same dtype",
        ),
        (
            "add_rms_norm_quantize_mxfp8",
            (X, X[:1], W, *STYLE),
            r"residual is bfloat16 \[1, 64\], wanted the same dtype and shape. Convert or expand",
        ),
        (
            "add_rms_norm_quantize_nvfp4_to_bf16",
            (X[:, :24], X[:, :24], W[:24], *STYLE, SCALE),
            "last dimension of x.*holds 24 elements, wanted a multiple of 16",
        ),
        (
            "gated_quantize_mxfp8_to_bf16",
            (X[:, :48], X[:, :48], "silu"),
            "last dimension of gate.*wanted a multiple of 32",
        ),
        (
            "gated_quantize_fp8_per_block",
            (X, X[:, :32], "silu"),
            r"gate is bfloat16 \[2, 64\] and up is bfloat16 \[2, 32\], wanted the same",
        ),
        (
            "gated_quantize_fp8_per_block",
            (X, X, "relu"),
            "activation is 'relu', wanted one of silu, gelu, gelu_tanh",
        ),
    ],
)
def test_refusals_say_what_was_wrong(name, args, message):
    with pytest.raises(ArgumentError, match=message) as error:
        operator(name)(*args)
    assert str(error.value).startswith(f"mokernels::{name}: ")
