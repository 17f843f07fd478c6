"""Linear operators: quantize the activations, multiply, in one operator with a gradient.

These are what the modules call. x [..., K] in bf16, fp16 or fp32; the result [..., N] in x's dtype.

====================  =================================  ======================================
operator              activations                        weight [N, K]
====================  =================================  ======================================
fp8_linear            E4M3, static ``input_scale``       E4M3, scale [], [N] or 128x128 blocks
fp8_per_token_linear  E4M3, one scale per token          E4M3, scale [], [N] or 128x128 blocks
fp8_block_linear      E4M3, one scale per 1x128 block    E4M3, scale [], [N] or 128x128 blocks
nvfp4_linear          NVFP4, static global scale         NVFP4, global scale [] or [N]
mxfp8_linear          MXFP8                              MXFP8
====================  =================================  ======================================

The gradient with respect to x goes through the frozen weight, and straight through the quantization
of the activations; the bias has one too. Weights and scales have none: train adapters beside them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mokernels.numerics as numerics
import mokernels.ops.quantize  # noqa: F401  (the gradients look its operators up)
from mokernels.formats import MXFP8_BLOCK, NVFP4_BLOCK
from mokernels.ops.checks import (
    check_bias,
    check_float,
    check_fp8_weight,
    check_multiple,
    check_mxfp8_weight,
    check_nvfp4_weight,
    check_scalar,
)
from mokernels.ops.gemm import fake_product
from mokernels.ops.registry import LIBRARY, NAMESPACE, operator, register


def _check_fp8(
    op: str, x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None
) -> None:
    check_float(op, "x", x)
    check_fp8_weight(op, x, weight, weight_scale)
    check_bias(op, bias, weight.shape[0])


def _check_fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None = None,
    input_multiplier: Tensor | None = None,
    plan_n: int = 0,
) -> None:
    _check_fp8("fp8_linear", x, weight, weight_scale, bias)
    check_scalar("fp8_linear", "input_scale", input_scale)
    if input_multiplier is not None:
        check_scalar("fp8_linear", "input_multiplier", input_multiplier)


def _fp8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor,
    bias: Tensor | None = None,
    input_multiplier: Tensor | None = None,
    plan_n: int = 0,
) -> Tensor:
    if input_multiplier is None:
        input_multiplier, input_scale = numerics.static_fp8_scales(input_scale)
    codes = numerics.quantize_fp8(x, input_multiplier)
    return numerics.scaled_product(
        numerics.dequantize_fp8(codes, input_scale),
        numerics.fp8_weight(weight, weight_scale),
        bias,
        x.dtype,
    )


def _check_fp8_per_token_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, plan_n: int = 0
) -> None:
    _check_fp8("fp8_per_token_linear", x, weight, weight_scale, bias)


def _fp8_per_token_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, plan_n: int = 0
) -> Tensor:
    return numerics.scaled_product(
        numerics.dequantize_fp8(*numerics.quantize_fp8_per_token(x)),
        numerics.fp8_weight(weight, weight_scale),
        bias,
        x.dtype,
    )


def _check_fp8_block_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, plan_n: int = 0
) -> None:
    _check_fp8("fp8_block_linear", x, weight, weight_scale, bias)


def _fp8_block_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, plan_n: int = 0
) -> Tensor:
    return numerics.scaled_product(
        numerics.dequantize_fp8(*numerics.quantize_fp8_per_block(x)),
        numerics.fp8_weight(weight, weight_scale),
        bias,
        x.dtype,
    )


def _check_nvfp4_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    input_scale: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
) -> None:
    check_float("nvfp4_linear", "x", x)
    check_multiple("nvfp4_linear", "x", x, NVFP4_BLOCK)
    check_nvfp4_weight("nvfp4_linear", x, x.shape[-1], weight, weight_scale, weight_scale_2)
    check_scalar("nvfp4_linear", "input_scale", input_scale)
    check_bias("nvfp4_linear", bias, weight.shape[0])


def _nvfp4_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor,
    input_scale: Tensor,
    bias: Tensor | None = None,
    plan_n: int = 0,
) -> Tensor:
    input_scale = input_scale.reshape(())
    return numerics.scaled_product(
        numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(x, input_scale), input_scale),
        numerics.nvfp4_weight(weight, weight_scale, weight_scale_2),
        bias,
        x.dtype,
    )


def _check_mxfp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, plan_n: int = 0
) -> None:
    check_float("mxfp8_linear", "x", x)
    check_multiple("mxfp8_linear", "x", x, MXFP8_BLOCK)
    check_mxfp8_weight("mxfp8_linear", x, weight, weight_scale)
    check_bias("mxfp8_linear", bias, weight.shape[0])


def _mxfp8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, plan_n: int = 0
) -> Tensor:
    return numerics.scaled_product(
        numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x)),
        numerics.mxfp8_weight(weight, weight_scale),
        bias,
        x.dtype,
    )


def _register_gradient(name: str, weight_tensors: tuple[str, ...], dequantize: str) -> None:
    """Give ``mokernels::<name>`` a gradient for x and bias.

    Args:
        name: the operator; its first argument is x.
        weight_tensors: its arguments that the weight's dequantizer takes, in order.
        dequantize: name of that operator.
    """
    names = [argument.name for argument in operator(name)._schema.arguments]  # type: ignore[attr-defined]
    weight_positions = [names.index(tensor) for tensor in weight_tensors]
    bias_position = names.index("bias")
    scale_position = names.index("global_scale_a") if "global_scale_a" in names else None
    dequantize_op = operator(dequantize)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # Only the frozen weight is saved: there is no gradient for it, so x is not needed.
        scale = None if scale_position is None else inputs[scale_position]
        ctx.save_for_backward(scale, *(inputs[position] for position in weight_positions))
        bias = inputs[bias_position]
        ctx.x_dtype = inputs[0].dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads: list[Tensor | None] = [None] * len(names)
        if ctx.needs_input_grad[0]:
            scale, *weight = ctx.saved_tensors
            product = grad @ _dequantized(dequantize_op, weight, grad.dtype)
            # Not on the gradient of the sums, which in fp16 might vanish.
            grads[0] = (product if scale is None else product * scale).to(ctx.x_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[bias_position]:
            rows = grad.reshape(-1, grad.shape[-1])
            grads[bias_position] = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return tuple(grads)

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def _dequantized(dequantize_op: Any, weight: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A weight [N, K] in ``dtype``; the last of the tensors of NVFP4 may be a global scale [N]."""
    name = str(dtype).removeprefix("torch.")
    if len(weight) < 3 or weight[-1].numel() == 1:
        return dequantize_op(*weight, name)  # type: ignore[no-any-return]
    codes, scale, global_scale = weight
    values = dequantize_op(codes, scale, global_scale.new_ones(()), "float32")
    return (values * global_scale.reshape(-1, 1)).to(dtype)


_FP8 = "Tensor x, Tensor weight, Tensor weight_scale, "
_NVFP4 = f"{_FP8}Tensor weight_scale_2, "
_TAIL = "Tensor? bias=None, int plan_n=0"
register(
    f"fp8_linear({_FP8}Tensor input_scale, Tensor? bias=None, Tensor? input_multiplier=None, "
    "int plan_n=0) -> Tensor",
    check=_check_fp8_linear,
    reference=_fp8_linear,
    fake=fake_product,
)
register(
    f"fp8_per_token_linear({_FP8}{_TAIL}) -> Tensor",
    check=_check_fp8_per_token_linear,
    reference=_fp8_per_token_linear,
    fake=fake_product,
)
register(
    f"fp8_block_linear({_FP8}{_TAIL}) -> Tensor",
    check=_check_fp8_block_linear,
    reference=_fp8_block_linear,
    fake=fake_product,
)
register(
    f"nvfp4_linear({_NVFP4}Tensor input_scale, {_TAIL}) -> Tensor",
    check=_check_nvfp4_linear,
    reference=_nvfp4_linear,
    fake=fake_product,
)
register(
    f"mxfp8_linear({_FP8}{_TAIL}) -> Tensor",
    check=_check_mxfp8_linear,
    reference=_mxfp8_linear,
    fake=fake_product,
)

for _name in ("fp8_linear", "fp8_per_token_linear", "fp8_block_linear"):
    _register_gradient(_name, ("weight", "weight_scale"), "dequantize_fp8")
_register_gradient("mxfp8_linear", ("weight", "weight_scale"), "dequantize_mxfp8")
_register_gradient("nvfp4_linear", ("weight", "weight_scale", "weight_scale_2"), "dequantize_nvfp4")
_register_gradient("fp8_weight_only_gemm", ("b", "scale_b"), "dequantize_fp8")
_register_gradient("mxfp8_weight_only_gemm", ("b", "scale_b"), "dequantize_mxfp8")
_register_gradient("nvfp4_weight_only_gemm", ("b", "scale_b", "global_scale_b"), "dequantize_nvfp4")
