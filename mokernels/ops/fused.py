"""Operators that compute activations and quantize them: an RMSNorm, or a gated activation function.

For every quantizer F of :data:`mokernels.ops.quantize.QUANTIZERS`, with its arguments <extra> and
its results <outs>:

==================================================================  ================================
operator                                                            result
==================================================================  ================================
rms_norm_quantize_F(x, weight, eps, style, <extra>)                 <outs> of norm(x)
add_rms_norm_quantize_F(x, residual, weight, eps, style, <extra>)   x + residual, <outs> of its norm
gated_quantize_F(gate, up, activation, <extra>)                     <outs> of act(gate) * up
==================================================================  ================================

x, residual, gate, up: [..., K] in bf16, fp16 or fp32, of any strides; the two of a call alike in
shape and dtype. weight: [K], any of these dtypes. The sum has the dtype of x.

``style`` says where the norm rounds; its statistics are fp32 in all of them:

- "cast_then_scale": (x32 * rsqrt(mean(x32 ** 2) + eps)) is rounded to x's dtype, and weight times
  that is computed in the dtype that the two promote to (Llama, Qwen, Mistral).
- "scale_then_cast": the weight multiplies in fp32, and the product is rounded to x's dtype
  (torch.nn.functional.rms_norm, OLMo 2).
- "one_plus_weight": 1 + weight multiplies in fp32, and the product is rounded (Gemma).

``activation`` is "silu", "gelu" or "gelu_tanh"; its result is rounded to the dtype of gate before
up multiplies it.

On the CPU each operator runs the operations of the eager modules in their order, so that a graph
that is rewritten to it keeps every bit. The kernels add the squares in an order of their own, which
depends on K alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from mokernels.errors import ArgumentError
from mokernels.ops.checks import FLOAT_DTYPES, check_float, describe
from mokernels.ops.quantize import QUANTIZERS, Quantizer
from mokernels.ops.registry import register, schema_of

STYLES = ("cast_then_scale", "scale_then_cast", "one_plus_weight")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
}


def rms_norm(x: Tensor, weight: Tensor, eps: float, style: str) -> Tensor:
    """The norm of x [..., K] as the modules compute it that round as ``style`` says."""
    x32 = x.to(torch.float32)
    variance = x32.pow(2).mean(-1, keepdim=True)
    normed = x32 * torch.rsqrt(variance + eps)
    if style == "cast_then_scale":
        return weight * normed.to(x.dtype)
    if style == "one_plus_weight":
        return (normed * (1.0 + weight.float())).to(x.dtype)
    return (normed * weight.float()).to(x.dtype)


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) * up."""
    return ACTIVATIONS[activation](gate) * up


def _check_alike(op: str, names: tuple[str, str], first: Tensor, second: Tensor) -> None:
    check_float(op, names[0], first)
    if first.dtype != second.dtype or first.shape != second.shape:
        raise ArgumentError(
            f"mokernels::{op}: {names[0]} is {describe(first)} and {names[1]} is "
            f"{describe(second)}, wanted the same dtype and shape. Convert or expand one first."
        )


def _check_norm(op: str, x: Tensor, weight: Tensor, style: str) -> None:
    check_float(op, "x", x)
    if weight.dtype not in FLOAT_DTYPES or tuple(weight.shape) != tuple(x.shape[-1:]):
        raise ArgumentError(
            f"mokernels::{op}: weight is {describe(weight)}, wanted shape [{x.shape[-1]}] in "
            "bfloat16, float16 or float32."
        )
    _check_choice(op, "style", style, STYLES)


def _check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(
            f"mokernels::{op}: {name} is {value!r}, wanted one of {', '.join(choices)}."
        )


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _register_rms_norm(name: str, quantizer: Quantizer) -> None:
    op = f"rms_norm_quantize_{name}"

    def check(x: Tensor, weight: Tensor, eps: float, style: str, *extra: Any) -> None:
        _check_norm(op, x, weight, style)
        quantizer.check(op, "x", x, *extra)

    def reference(x: Tensor, weight: Tensor, eps: float, style: str, *extra: Any) -> Any:
        return quantizer.reference(rms_norm(x, weight, eps, style), *extra)

    def fake(x: Tensor, weight: Tensor, eps: float, style: str, *extra: Any) -> Any:
        return quantizer.fake(x, *extra)

    arguments = ("Tensor x", "Tensor weight", "float eps", "str style", *quantizer.extra)
    register(
        schema_of(op, arguments, quantizer.returns),
        check=check,
        reference=reference,
        fake=fake,
        launcher=("rms_norm_quantize", name),
    )


def _register_add_rms_norm(name: str, quantizer: Quantizer) -> None:
    op = f"add_rms_norm_quantize_{name}"

    def check(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, style: str, *extra: Any
    ) -> None:
        _check_alike(op, ("x", "residual"), x, residual)
        _check_norm(op, x, weight, style)
        quantizer.check(op, "x", x, *extra)

    def reference(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, style: str, *extra: Any
    ) -> tuple[Tensor, ...]:
        total = (x + residual).contiguous()
        return total, *_as_tuple(quantizer.reference(rms_norm(total, weight, eps, style), *extra))

    def fake(
        x: Tensor, residual: Tensor, weight: Tensor, eps: float, style: str, *extra: Any
    ) -> tuple[Tensor, ...]:
        return x.new_empty(x.shape), *_as_tuple(quantizer.fake(x, *extra))

    tensors = ("Tensor x", "Tensor residual", "Tensor weight")
    register(
        schema_of(
            op,
            (*tensors, "float eps", "str style", *quantizer.extra),
            ("Tensor", *quantizer.returns),
        ),
        check=check,
        reference=reference,
        fake=fake,
        launcher=("add_rms_norm_quantize", name),
    )


def _register_gated(name: str, quantizer: Quantizer) -> None:
    op = f"gated_quantize_{name}"

    def check(gate: Tensor, up: Tensor, activation: str, *extra: Any) -> None:
        _check_alike(op, ("gate", "up"), gate, up)
        _check_choice(op, "activation", activation, tuple(ACTIVATIONS))
        quantizer.check(op, "gate", gate, *extra)

    def reference(gate: Tensor, up: Tensor, activation: str, *extra: Any) -> Any:
        return quantizer.reference(gated(gate, up, activation), *extra)

    def fake(gate: Tensor, up: Tensor, activation: str, *extra: Any) -> Any:
        return quantizer.fake(gate, *extra)

    arguments = ("Tensor gate", "Tensor up", "str activation", *quantizer.extra)
    register(
        schema_of(op, arguments, quantizer.returns),
        check=check,
        reference=reference,
        fake=fake,
        launcher=("gated_quantize", name),
    )


for _name, _quantizer in QUANTIZERS.items():
    _register_rms_norm(_name, _quantizer)
    _register_add_rms_norm(_name, _quantizer)
    _register_gated(_name, _quantizer)
