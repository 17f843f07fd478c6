"""``tl.dot``, ``tl.dot_scaled`` and inline assembly for the interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.support.interpreted_numbers import FP8, TORCH_DTYPES, name_of, values_of

MODEL_OF_ASSEMBLY: dict[str, Callable[..., Sequence[np.ndarray]]] = {}
"""Emulations of inline assembly by its text (white space normalised)."""

matrix_product: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.matmul
"""How dots multiply [M, K] by [K, N]; tests of bits put :func:`product_in_order` here."""

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def model_of(assembly: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function computes what this inline assembly does, on numpy arrays.

    It takes the operands as the interpreter keeps them (bf16 and fp8 as bits) and returns a tuple
    of outputs. It is a model made by hand: it shows that a kernel is wired correctly, not what a
    GPU computes.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        MODEL_OF_ASSEMBLY[_normalised(assembly)] = function
        return function

    return register


def product_in_order(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[M, K] by [K, N] in fp32, added from the first k to the last, whatever M and N are.

    A matrix unit adds in another order, but one that does not follow the tile. That of BLAS does.
    """
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for column, row in zip(a.T, b, strict=True):
        total += column[:, None] * row
    return total


def create_dot(stock: Callable[..., Any]) -> Callable[..., Any]:
    """The builder's method for floats in fp32; integers go to the interpreter's own."""
    from triton.runtime.interpreter import TensorHandle

    def fixed(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        if not {name_of(a), name_of(b)} <= set(TORCH_DTYPES):
            return stock(self, a, b, acc, *options)
        # Dense, row by row: BLAS adds in another order where an operand lies otherwise in memory.
        product = matrix_product(*(values_of(x).astype(np.float32, order="C") for x in (a, b)))
        return TensorHandle((product + acc.data).astype(acc.data.dtype), acc.dtype.scalar)

    return fixed


def create_dot_scaled(
    self: Any,
    a: Any,
    a_scale: Any,
    a_format: Any,
    b: Any,
    b_scale: Any,
    b_format: Any,
    fast_math: bool,
    a_packed_along_k: bool,
    b_packed_along_k: bool,
    acc: Any,
) -> Any:
    """[M, K] by [K, N]; the scales are [M, K / group] and [N, K / group]."""
    from triton.runtime.interpreter import TensorHandle

    lhs = _scaled(a, a_format, -1 if a_packed_along_k else -2, a_scale)
    packed_axis = -2 if b_packed_along_k else -1
    rhs = _scaled(b, b_format, packed_axis, b_scale, transposed=True)
    total = matrix_product(lhs, rhs) + acc.data
    return TensorHandle(total.astype(np.float32), acc.dtype.scalar)


def _scaled(
    operand: Any, element: Any, packed_axis: int, scale: Any, transposed: bool = False
) -> np.ndarray:
    from triton._C.libtriton import ir

    if element == ir.ScaleDotElemTypeTY.E2M1:
        values = _unpacked_e2m1(operand.data, packed_axis)
    else:
        values = values_of(operand).astype(np.float32)
    if scale is None:
        return values
    factors = values_of(scale) if name_of(scale) in FP8 else _powers_of_two(scale.data)
    k_axis = -2 if transposed else -1
    factors = np.repeat(factors, values.shape[k_axis] // factors.shape[-1], axis=-1)
    return values * (np.swapaxes(factors, -1, -2) if transposed else factors)


def _unpacked_e2m1(packed: np.ndarray, axis: int) -> np.ndarray:
    codes = np.moveaxis(packed.view(np.uint8), axis, -1)
    codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    values = np.where(codes & 8, -_E2M1[codes & 7], _E2M1[codes & 7])
    return np.moveaxis(values, -1, axis)


def _powers_of_two(exponents: np.ndarray) -> np.ndarray:
    exponents = exponents.view(np.uint8)
    powers = np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)
    return np.where(exponents == 255, np.float32("nan"), powers)


def create_inline_asm(
    self: Any, assembly: str, constraints: str, operands: Any, types: Any, pure: bool, pack: int
) -> Any:
    """The builder\'s method: run the model of this text, or refuse."""
    from triton.runtime.interpreter import TensorHandle

    model = MODEL_OF_ASSEMBLY.get(_normalised(assembly))
    if model is None:
        raise NotImplementedError(f"no model of the inline assembly: {_normalised(assembly)}")
    results = model(*(operand.data for operand in operands))
    handles = [TensorHandle(np.asarray(r), t.scalar) for r, t in zip(results, types, strict=True)]

    class Call:
        def get_result(self, index: int) -> Any:
            return handles[index]

    return Call()


def _normalised(assembly: str) -> str:
    return " ".join(str(assembly).split())
