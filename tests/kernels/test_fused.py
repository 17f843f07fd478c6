"""Kernels that compute activations and quantize them, against the operators on the CPU.

The kernels add squares in an order of their own, and their exponential function is not the CPU's.
So most tests take inputs that leave no room: squares whose sum is exact in any order, gates whose
activation is. For these every bit has to agree, whatever the quantizer.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mokernels.ops import launch
from mokernels.ops.kernels.fused import sum_of_row
from mokernels.ops.launch.fused import plan_gated_quantize, plan_norm_quantize
from mokernels.ops.quantize import QUANTIZERS
from mokernels.ops.quantize_configs import LONGEST_ROW
from tests.kernels.activations import FLOATS, every_float, every_target, normal, scalar, targets
from tests.support.compare import assert_same_bits

OPS = torch.ops.mokernels
STYLES = ("cast_then_scale", "scale_then_cast", "one_plus_weight")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
LONG = LONGEST_ROW + 1024
MULTIPLES = {"nvfp4": 16, "mxfp8": 32}
EPS = 1e-5

every_quantizer = pytest.mark.parametrize("name", QUANTIZERS)


def multiple_of(name: str) -> int:
    return MULTIPLES.get(name.partition("_")[0], 1)


def extra(name: str, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    static = name == "fp8" or name.startswith("nvfp4")
    return (scalar(0.003, torch.device(device)),) if static else ()


def integers(low: int, high: int, *shape: int, seed: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))


def exact_rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Integers up to 4, and 128 in every 512th column.

    Their squares sum to less than 2 ** 20, also those of the sums with :func:`exact_residual`,
    which are multiples of 1/16: fp32 adds them without rounding.
    """
    x = integers(-4, 4, *shape, seed=seed)
    x[..., 5::512] = 128
    return x.to(dtype)


def exact_residual(*shape: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Such that |x + residual| is at most 4, or 128 and quarters, which bf16 has to round."""
    residual = torch.zeros(shape)
    residual[..., 5::512] = integers(1, 7, *residual[..., 5::512].shape, seed=seed) / 4
    return residual.to(dtype)


def saturated(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gates whose activation is the gate itself, or a zero, in every arithmetic."""
    gate = integers(32, 96, *shape, seed=seed)
    kind = integers(0, 3, *shape, seed=seed + 1)
    return torch.where(kind == 0, -gate - 100, torch.where(kind == 1, 0, gate)).to(dtype)


def signed_as_eager(gate: Tensor, activation: str) -> Tensor:
    """Without gates that become a zero where torch's fp32 GELU on the CPU drops the zero's sign."""
    drops = activation == "gelu" and gate.dtype == torch.float32
    return gate.abs() + 32 if drops else gate


def on(device: torch.device, *args: object) -> list[object]:
    """The same arguments there; strides are kept by the plain copy."""
    return [a.to(device) if isinstance(a, Tensor) else a for a in args]


def assert_agree(results: object, expected: object) -> None:
    pairs = [r if isinstance(r, tuple) else (r,) for r in (results, expected)]
    for result, wanted in zip(*pairs, strict=True):
        assert result.is_contiguous()
        assert_same_bits(result.cpu(), wanted)


def check_norm(name: str, device, target, x: Tensor, residual: Tensor | None, *rest) -> None:
    """``rest``: weight and style."""
    weight, style = rest
    tail = (weight, EPS, style, *extra(name))
    if residual is None:
        expected = getattr(OPS, f"rms_norm_quantize_{name}")(x, *tail)
        results = launch.rms_norm_quantize(name, *on(device, x, *tail), target=target)
    else:
        expected = getattr(OPS, f"add_rms_norm_quantize_{name}")(x, residual, *tail)
        args = on(device, x, residual, *tail)
        results = launch.add_rms_norm_quantize(name, *args, target=target)
    assert_agree(results, expected)


def check_gated(name: str, device, target, gate: Tensor, up: Tensor, activation: str) -> None:
    args = (gate, up, activation, *extra(name))
    expected = getattr(OPS, f"gated_quantize_{name}")(*args)
    results = launch.gated_quantize(name, *on(device, *args), target=target)
    assert_agree(results, expected)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("style", STYLES)
@every_quantizer
def test_norm_of_exact_squares(device, name, style, with_residual):
    target = targets()[0]
    for dtype in FLOATS:
        k = 416
        x = exact_rows(2, k, dtype=dtype)
        residual = exact_residual(2, k, dtype=dtype) if with_residual else None
        for weight_dtype in {dtype, torch.float32}:
            weight = normal(k, seed=3, dtype=weight_dtype)
            check_norm(name, device, target, x, residual, weight, style)


@every_target
@every_quantizer
def test_norm_of_every_target_and_width(device, target, name):
    for k in (48, 4096, LONG):
        if k % multiple_of(name) == 0:
            x, residual = exact_rows(2, k), exact_residual(2, k)
            check_norm(name, device, target, x, residual, normal(k, seed=3), "cast_then_scale")


@pytest.mark.parametrize("style", STYLES)
def test_norm_with_a_weight_of_another_dtype(device, style):
    x, residual = exact_rows(2, 96, dtype=torch.float16), exact_residual(2, 96, dtype=torch.float16)
    weight = normal(192, seed=3, dtype=torch.bfloat16)[::2]
    check_norm("fp8_per_token", device, targets()[0], x, residual, weight, style)


def test_a_row_of_zeros_without_eps_is_nan(device):
    # 0 * inf: only in the row, not in the columns beside it that a maximum would see.
    x, weight = torch.zeros(2, 100), torch.ones(100)
    x[1, 3] = 2.0**-80  # its square is 0 in fp32
    args = (x, weight, 0.0, "scale_then_cast")
    expected = OPS.rms_norm_quantize_fp8_per_block(*args)
    assert expected[1][:, 0].isnan().tolist() == [True, True]
    results = launch.rms_norm_quantize("fp8_per_block", *on(device, *args), target=targets()[0])
    assert_agree(results, expected)
    x[:] = 2.0**-80
    expected = OPS.rms_norm_quantize_fp8_per_token(*args)
    assert not expected[1].isnan().any()
    results = launch.rms_norm_quantize("fp8_per_token", *on(device, *args), target=targets()[0])
    assert_agree(results, expected)


@every_float
@every_quantizer
def test_gated_of_exact_activations(device, name, dtype):
    gate, up = saturated(3, 416, dtype=dtype), normal(3, 416, seed=2, dtype=dtype)
    for activation in ACTIVATIONS:
        exact = signed_as_eager(gate, activation)
        check_gated(name, device, targets()[0], exact, up, activation)


@every_target
@every_quantizer
def test_gated_of_every_target_and_width(device, target, name):
    for k in (48, 4096, LONG):
        if k % multiple_of(name) == 0:
            gate, up = saturated(2, k), normal(2, k, seed=2)
            check_gated(name, device, target, gate, up, "silu")


def assert_few_codes_differ(result: Tensor, expected: Tensor) -> None:
    """Codes are neighbours where they differ, which at most one in 500 does.

    Sums of squares and exponentials differ by a few fp32 roundings, 2 ** -20 at the most. A
    rounding to 8 bits (bf16) goes the other way for one in 2 ** 12 of the values, and there are
    two, and then a code's: one in 1000. Without one of these roundings three in 100 would differ.
    """
    result, expected = (
        torch.where(codes < 0, -(codes & 0x7F), codes)
        for codes in (t.cpu().view(torch.int8).int() for t in (result, expected))
    )
    off = (result - expected).abs()
    assert off.max() <= 1
    assert (off > 0).sum() <= off.numel() / 500


@every_float
@pytest.mark.parametrize("style", STYLES)
def test_norm_of_random_rows(device, style, dtype):
    x, residual = normal(24, 1000, dtype=dtype), normal(24, 1000, seed=1, dtype=dtype)
    args = (x, residual, normal(1000, seed=2, dtype=dtype), EPS, style, torch.tensor(0.01))
    expected = OPS.add_rms_norm_quantize_fp8(*args)
    results = launch.add_rms_norm_quantize("fp8", *on(device, *args), target=targets()[0])
    assert_same_bits(results[0].cpu(), expected[0])
    assert_few_codes_differ(results[1], expected[1])


@every_float
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_of_random_values(device, activation, dtype):
    gate, up = normal(24, 1000, dtype=dtype) * 3, normal(24, 1000, seed=1, dtype=dtype)
    args = (gate, up, activation, torch.tensor(0.02))
    expected = OPS.gated_quantize_fp8(*args)
    result = launch.gated_quantize("fp8", *on(device, *args), target=targets()[0])
    assert_few_codes_differ(result, expected)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with other strides; memory between them is NaN."""
    if layout == "halves":
        return torch.cat([values, torch.full_like(values, torch.nan)], dim=-1)[
            ..., : values.shape[-1]
        ]
    if layout == "swapped" and values.dim() > 2:
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "columns" and values.dim() > 1:
        return values.mT.contiguous().mT
    return values


leads = st.lists(st.integers(0, 3), max_size=3)
layouts = st.sampled_from(["dense", "halves", "swapped", "columns"])
names = st.sampled_from(list(QUANTIZERS))
widths = st.integers(1, 300)
dtypes = st.sampled_from(FLOATS)


@settings(max_examples=30)
@given(names, leads, widths, dtypes, layouts, layouts, st.sampled_from(STYLES), st.booleans())
def test_norm_of_any_shape(device, name, lead, width, dtype, layout, other, style, with_residual):
    k = -(-width // multiple_of(name)) * multiple_of(name)
    x = laid_out(exact_rows(*lead, k, dtype=dtype), layout)
    residual = laid_out(exact_residual(*lead, k, dtype=dtype), other) if with_residual else None
    weight = normal(k, seed=3, dtype=dtype)
    check_norm(name, device, targets()[-1], x, residual, weight, style)


@settings(max_examples=30)
@given(names, leads, widths, dtypes, layouts, layouts, st.sampled_from(ACTIVATIONS))
def test_gated_of_any_shape(device, name, lead, width, dtype, layout, other, activation):
    k = -(-width // multiple_of(name)) * multiple_of(name)
    gate = signed_as_eager(saturated(*lead, k, dtype=dtype), activation)
    gate = laid_out(gate, layout)
    up = laid_out(normal(*lead, k, seed=2, dtype=dtype), other)
    check_gated(name, device, targets()[-1], gate, up, activation)


def test_halves_of_one_tensor_are_not_copied(device):
    both = normal(2, 3, 512).to(device)
    gate, up = both.chunk(2, dim=-1)
    _, (planned,) = plan_gated_quantize("mxfp8", gate, up, "silu", target=targets()[0])
    assert [t.data_ptr() for t in planned.args[:2]] == [gate.data_ptr(), up.data_ptr()]
    _, (planned,) = plan_norm_quantize(
        "mxfp8", gate, up, normal(256).to(device), EPS, STYLES[0], target=targets()[0]
    )
    assert [t.data_ptr() for t in planned.args[:2]] == [gate.data_ptr(), up.data_ptr()]


def test_a_token_gets_the_same_codes_wherever_it_stands(device):
    rows, weight = normal(5, 1040).to(device), normal(1040, seed=1).to(device)
    rest, target = (weight, EPS, STYLES[0]), targets()[0]
    batch = launch.rms_norm_quantize("fp8_per_token", rows, *rest, target=target)
    padded = torch.zeros(5, 1043, dtype=rows.dtype, device=device)
    padded[:, 1:1041] = rows
    moved = launch.rms_norm_quantize("fp8_per_token", padded[:, 1:1041], *rest, target=target)
    assert_agree(moved, tuple(t.cpu() for t in batch))
    for row in range(5):
        alone = launch.rms_norm_quantize("fp8_per_token", rows[row], *rest, target=target)
        assert_agree(alone, tuple(t[row].cpu() for t in batch))


@triton.jit
def sum_kernel(x, out, COLUMNS: tl.constexpr):
    value = tl.load(x + tl.arange(0, COLUMNS))[None, :]
    tl.store(out + tl.arange(0, 1)[:, None], sum_of_row(value))


@pytest.mark.parametrize("columns", [128, 4096, 16384])
def test_the_order_of_the_additions(device, columns):
    values = normal(columns, dtype=torch.float32) ** 2
    expected = values
    while expected.numel() > min(columns // 2, 4096):
        expected = expected.view(2, -1)[0] + expected.view(2, -1)[1]
    while expected.numel() > 1:
        expected = expected[0::2] + expected[1::2]
    for offset in (0, 1):
        x = torch.cat([values.new_zeros(offset), values]).to(device)
        out = torch.zeros(1, device=device)
        sum_kernel[(1,)](x[offset:], out, COLUMNS=columns, num_warps=8)
        assert_same_bits(out.cpu(), expected)
