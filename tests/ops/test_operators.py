"""Every operator: schema checks, shapes, dtypes, strides, gradients, refusals, on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mokernels  # noqa: F401  (registers the operators)
from mokernels import numerics
from mokernels.errors import ArgumentError
from mokernels.ops.quantize import QUANTIZERS as ALL_QUANTIZERS
from tests.ops.test_fake_quantize import ALL as FAKE_QUANTIZERS
from tests.support.compare import assert_same_bits
from tests.support.operators import cases, fp8_weight

OPS = torch.ops.mokernels
FP8 = torch.float8_e4m3fn
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


PRODUCTS = list(cases())
LINEAR = [n for n in PRODUCTS if "linear" in n or "weight_only" in n]


def call(name, args, **kwargs):
    return getattr(OPS, name.partition("/")[0])(*args, **kwargs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_the_product_of_the_dequantized_operands(name, dtype):
    torch.manual_seed(0)
    args, x, weight, bias, _ = cases(dtype=dtype)[name]
    y = call(name, args)
    assert y.dtype == dtype
    assert y.shape == (2, 3, 40)
    exact = x.double() @ weight.double().T + bias.double()
    # fp32 accumulation of 96 products, then one rounding to the output's dtype
    spacing = torch.finfo(dtype).eps * exact.abs()
    budget = spacing + 96 * 2.0**-24 * (x.double().abs() @ weight.double().abs().T) + 1e-7
    assert ((y.double() - exact).abs() <= budget).all()


@pytest.mark.parametrize("lead", [(), (0,), (1,), (0, 4), (1, 1), (7,)], ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_leading_dimensions_are_kept(name, lead):
    args, *_ = cases(lead=lead, n=3)[name]
    y = call(name, args)
    assert y.shape == (*lead, 3)
    assert y.is_contiguous()


@pytest.mark.parametrize("name", LINEAR)
def test_strides_of_the_activations_do_not_matter(name):
    torch.manual_seed(1)
    args, *_ = cases(lead=(4, 6))[name]
    x = args[0]
    wide = torch.zeros(4, 6, 2 * x.shape[-1], dtype=x.dtype)
    wide[..., ::2] = x
    expected = call(name, args)
    for view in (
        wide[..., ::2],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.expand(4, 6, -1),
    ):
        assert torch.equal(call(name, (view, *args[1:])), expected)


@pytest.mark.parametrize("name", LINEAR)
def test_a_row_alone_equals_the_row_of_a_batch(name):
    """Quantization is per token at most: no token's scale may see another token."""
    torch.manual_seed(2)
    args, *_ = cases(lead=(5,), dtype=torch.float32)[name]
    batch = call(name, args)
    for row in range(5):
        alone = call(name, (args[0][row : row + 1], *args[1:]))
        # the CPU's GEMM may add a single row in another order
        assert torch.allclose(alone[0], batch[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LINEAR)
def test_gradients_pass_through_the_frozen_weight(name):
    torch.manual_seed(3)
    args, _, weight, bias, position = cases(lead=(2, 5), dtype=torch.float32)[name]
    x, bias = args[0].clone().requires_grad_(), bias.clone().requires_grad_()
    y = call(name, (x, *args[1:position], bias, *args[position + 1 :]))
    grad = torch.randn_like(y)
    y.backward(grad)
    assert torch.allclose(x.grad, grad @ weight, rtol=1e-5, atol=1e-5)
    assert torch.allclose(bias.grad, grad.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_a_frozen_input_needs_no_graph(name):
    args, *_ = cases()[name]
    assert not call(name, args).requires_grad


PRODUCERS = ("rms_norm", "add_rms_norm", "gated")
QUANTIZERS = {
    "quantize_fp8": lambda x: (x, torch.tensor(0.02)),
    "quantize_fp8_per_token": lambda x: (x,),
    "quantize_fp8_per_block": lambda x: (x,),
    "quantize_nvfp4": lambda x: (x, torch.tensor(0.002)),
    "quantize_mxfp8": lambda x: (x,),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_quantize_then_dequantize(name, lead, dtype):
    torch.manual_seed(4)
    x = torch.randn(*lead, 160).to(dtype)
    args = QUANTIZERS[name](x)
    result = call(name, args)
    codes = result[0] if isinstance(result, tuple) else result
    assert codes.is_contiguous()
    undo = name.replace("quantize", "dequantize")
    if name == "quantize_fp8":
        back = call(undo, (codes, numerics.static_fp8_scales(args[1])[1], "float32"))
    elif name == "quantize_nvfp4":
        back = call(undo, (*result, args[1], "float32"))
    else:
        back = call(undo, (*result, "float32"))
    assert back.shape == x.shape
    if x.numel():
        assert (back - x.float()).norm() < 0.12 * x.float().norm()


def test_quantize_fp8_uses_the_multiplier_it_is_given():
    x, scale = torch.randn(4, 8), torch.tensor(0.0123)
    multiplier, _ = numerics.static_fp8_scales(scale)
    derived = OPS.quantize_fp8(x, scale)
    assert torch.equal(derived.float(), OPS.quantize_fp8(x, scale, multiplier).float())
    halved = OPS.quantize_fp8(x, scale, multiplier / 2)
    assert not torch.equal(derived.float(), halved.float())


@given(m=st.integers(0, 5), n=st.integers(1, 70), k=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_fp8_takes_any_shape(m, n, k):
    torch.manual_seed(m + n + k)
    x = torch.randn(m, k)
    for granularity in ("tensor", "channel", "block"):
        weight, scale = fp8_weight(n, k, granularity)
        y = OPS.fp8_block_linear(x, weight, scale)
        codes, block_scale = OPS.quantize_fp8_per_block(x)
        z = OPS.fp8_gemm(codes, weight, block_scale, scale, None, "float32")
        assert torch.equal(y, z)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 2)], ids=str)
def test_values_in_bf16_are_exact_but_for_the_global_scale(lead, dtype):
    torch.manual_seed(7)
    x, g = torch.randn(*lead, 160).to(dtype), torch.tensor(0.002)
    codes, scale = OPS.quantize_nvfp4(x, g)
    exact = OPS.dequantize_nvfp4(codes, scale, torch.ones(1), "float32")
    assert_same_bits(OPS.quantize_nvfp4_to_bf16(x, g), exact.bfloat16())
    assert torch.equal(exact, exact.bfloat16().float())
    exact = OPS.dequantize_mxfp8(*OPS.quantize_mxfp8(x), "float32")
    assert_same_bits(OPS.quantize_mxfp8_to_bf16(x), exact.bfloat16())
    assert torch.equal(exact, exact.bfloat16().float())


@pytest.mark.parametrize("lead", [(), (0,), (4,)], ids=str)
def test_quantized_values_times_a_weight_are_the_linear_operator(lead):
    torch.manual_seed(8)
    args, *_ = cases(lead=lead, dtype=torch.float16)["nvfp4_linear/rows"]
    x, w4, s4, rows4, g, bias = args
    values = OPS.quantize_nvfp4_to_bf16(x, g)
    y = OPS.nvfp4_weight_only_gemm(values, w4, s4, rows4, bias, 0, g, "float16")
    # The sums are the same but for fp32 roundings of the scales; then both round to fp16.
    assert torch.allclose(y.float(), call("nvfp4_linear", args).float(), rtol=2e-3, atol=1e-3)
    assert y.dtype == torch.float16
    args, *_ = cases(lead=lead, dtype=torch.float16)["mxfp8_linear"]
    values = OPS.quantize_mxfp8_to_bf16(args[0])
    y = OPS.mxfp8_weight_only_gemm(values, *args[1:], 0, "float16")
    assert_same_bits(y, call("mxfp8_linear", args))


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ["nvfp4_weight_only_gemm/scaled", "mxfp8_weight_only_gemm"])
def test_the_gradient_has_the_dtype_of_x_whatever_the_output(name, dtype, out_dtype):
    torch.manual_seed(9)
    args, _, weight, *_ = cases(dtype=dtype)[name]
    x = args[0].clone().requires_grad_()
    y = getattr(OPS, name.partition("/")[0])(x, *args[1:], out_dtype=out_dtype)
    assert y.dtype == getattr(torch, out_dtype)
    grad = torch.randn_like(y)
    y.backward(grad)
    assert x.grad.dtype == dtype
    exact = grad.float() @ weight
    assert torch.allclose(x.grad.float(), exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


OPCHECK_WITHOUT_SCHEMA = (
    # test_schema perturbs its inputs by arithmetic that torch lacks for float8 on the CPU.
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def without_fp8(args):
    return not any(isinstance(a, torch.Tensor) and a.dtype == FP8 for a in args)


@pytest.mark.parametrize("name", PRODUCTS)
def test_opcheck_products(name):
    torch.manual_seed(5)
    args, *_ = cases()[name]
    utils = {} if without_fp8(args) else {"test_utils": OPCHECK_WITHOUT_SCHEMA}
    torch.library.opcheck(getattr(OPS, name.partition("/")[0]).default, args, **utils)


@pytest.mark.parametrize("name", LINEAR)
def test_opcheck_products_with_gradient(name):
    torch.manual_seed(6)
    args, *_ = cases()[name]
    args = (args[0].clone().requires_grad_(), *args[1:])
    operator = getattr(OPS, name.partition("/")[0]).default
    torch.library.opcheck(operator, args, test_utils=OPCHECK_WITHOUT_SCHEMA)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_opcheck_quantizers(name):
    args = QUANTIZERS[name](torch.randn(3, 4, 64, dtype=torch.bfloat16))
    torch.library.opcheck(getattr(OPS, name).default, args)
    result = call(name, args)
    operator = getattr(OPS, name.replace("quantize", "dequantize")).default
    if name == "quantize_fp8":
        result = (result, args[1])
    elif name == "quantize_nvfp4":
        result = (*result, args[1])
    torch.library.opcheck(operator, result, test_utils=OPCHECK_WITHOUT_SCHEMA)


def test_opcheck_values_in_bf16():
    x = torch.randn(3, 4, 64, dtype=torch.bfloat16)
    torch.library.opcheck(OPS.quantize_nvfp4_to_bf16.default, (x, torch.tensor(0.002)))
    torch.library.opcheck(OPS.quantize_mxfp8_to_bf16.default, (x,))


def test_every_operator_is_checked():
    registered = {
        name.removeprefix("mokernels::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("mokernels::")
    }
    covered = {n.partition("/")[0] for n in PRODUCTS} | set(QUANTIZERS)
    covered |= {n.replace("quantize", "dequantize") for n in QUANTIZERS}
    covered |= {"quantize_nvfp4_to_bf16", "quantize_mxfp8_to_bf16"}
    # Those of tests/ops/test_fused.py, which takes every quantizer there is.
    covered |= {f"{producer}_quantize_{name}" for producer in PRODUCERS for name in ALL_QUANTIZERS}
    # Those of tests/ops/test_fake_quantize.py.
    covered |= {f"fake_quantize_{name.partition('/')[0]}" for name in FAKE_QUANTIZERS}
    assert registered == covered


X = torch.randn(2, 64, dtype=torch.bfloat16)
W = torch.randn(8, 64).to(FP8)
ONE = torch.tensor(1.0)
PACKED = torch.zeros(8, 32, dtype=torch.uint8)
BLOCKS = torch.ones(8, 4).to(FP8)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("fp8_linear", (X, W.t(), ONE, ONE), r"weight float8_e4m3fn \[64, 8\].*not transposed"),
        ("fp8_linear", (X, W.float(), ONE, ONE), "the weight is float32.*wanted float8_e4m3fn"),
        (
            "fp8_linear",
            (X.double(), W, ONE, ONE),
            "x is float64.*wanted bfloat16, float16 or float32",
        ),
        (
            "fp8_linear",
            (X, W, torch.ones(7), ONE),
            r"scale is float32 \[7\], wanted \[\].*\[8\].*\[1, 1\]",
        ),
        ("fp8_linear", (X, W, ONE.double(), ONE), "scale is float64.*wanted float32"),
        (
            "fp8_linear",
            (X, W, ONE, torch.ones(2)),
            r"input_scale is float32 \[2\], wanted shape \[\]",
        ),
        (
            "fp8_linear",
            (X, W, ONE, ONE, torch.ones(9)),
            r"bias is float32 \[9\], wanted shape \[8\]",
        ),
        (
            "fp8_gemm",
            (W, W, torch.ones(3), ONE),
            r"scale_a is float32 \[3\], wanted .*\[8\].*1x128",
        ),
        ("fp8_gemm", (X, W, ONE, ONE), "a is bfloat16.*wanted float8_e4m3fn"),
        ("fp8_gemm", (W, W, ONE, ONE, None, "int8"), "out_dtype is 'int8', wanted one of bfloat16"),
        ("nvfp4_linear", (X, PACKED, BLOCKS, ONE, torch.ones(2)), r"input_scale is float32 \[2\]"),
        (
            "nvfp4_linear",
            (X, PACKED, BLOCKS.float(), ONE, ONE),
            "block scale is float32.*wanted float8",
        ),
        ("nvfp4_linear", (X, PACKED, BLOCKS[:, :3], ONE, ONE), r"\[8, 3\], wanted shape \[8, 4\]"),
        ("nvfp4_linear", (X[:, :24], PACKED[:, :12], BLOCKS, ONE, ONE), "multiple of 16"),
        ("mxfp8_linear", (X, W, torch.ones(8, 3, dtype=torch.uint8)), r"wanted shape \[8, 2\]"),
        ("mxfp8_linear", (X[:, :48], W[:, :48], PACKED), "multiple of 32"),
        (
            "nvfp4_linear",
            (X, PACKED, BLOCKS, torch.ones(3), ONE),
            r"global scale is float32 \[3\], wanted \[\], or \[8\] where rows of several weights",
        ),
        (
            "nvfp4_weight_only_gemm",
            (X, PACKED, BLOCKS, ONE, None, 0, torch.ones(8)),
            r"global_scale_a is float32 \[8\], wanted shape \[\]",
        ),
        (
            "mxfp8_weight_only_gemm",
            (X, W, torch.ones(8, 2, dtype=torch.uint8), None, 0, "half"),
            "out_dtype is 'half', wanted one of bfloat16",
        ),
        ("quantize_nvfp4", (X[:, :10], ONE), "multiple of 16. Pad it"),
        ("quantize_nvfp4_to_bf16", (X, torch.ones(2)), r"global_scale is float32 \[2\]"),
        ("quantize_mxfp8_to_bf16", (X[:, :48],), "multiple of 32. Pad it"),
        (
            "dequantize_fp8",
            (W, torch.ones(5)),
            r"wanted a scale of one of the shapes \[\], \[1\], \[8\]",
        ),
        ("dequantize_mxfp8", (W, PACKED), r"scale is uint8 \[8, 32\], wanted shape \[8, 2\]"),
    ],
)
def test_refusals_say_what_was_wrong(name, args, message):
    with pytest.raises(ArgumentError, match=message) as error:
        call(name, args)
    assert str(error.value).startswith(f"mokernels::{name}: ")


def test_fake_tensors_meet_the_same_checks():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ArgumentError):
        OPS.fp8_linear(X, W.t(), ONE, ONE)
