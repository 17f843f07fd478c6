"""Repair the arithmetic of Triton's interpreter, for triton 3.6 to 3.9.

The interpreter runs a kernel's Python source on numpy arrays. numpy has no bf16 and no fp8, so the
interpreter keeps such values as their bits in unsigned integers, and several of its operations then
compute on the bits or round in a way that no GPU does: its cast to e4m3 misses 27922 of the 65536
bf16 values, its cast to bf16 truncates, its bf16 dot multiplies bit patterns. ``install`` replaces
those operations; what is still not modelled raises instead of returning a wrong number.

==========================  ==================================================================
operation                   after ``install``
==========================  ==================================================================
float casts                 round to nearest even (or towards zero, if asked for); e4m3 and
                            e5m2 saturate, infinities included, and NaN stays NaN
bf16 arithmetic             in fp32, rounded to bf16 after every operation
arithmetic on fp8 values    TypeError
tl.sum, scans of bf16, fp8  TypeError (on a GPU the result depends on the order of addition)
tl.dot                      operands to fp32, product and sum in fp32
tl.dot_scaled               e2m1, e4m3, e5m2, bf16, fp16 with e8m0 or e4m3 scales
tl.maximum, tl.minimum,     drop NaN unless ``propagate_nan`` says otherwise, as PTX does
tl.clamp
tl.fma                      rounds once (fp16, fp32); TypeError for bf16
range(tensor)               a tensor of one element is an index, also with numpy >= 2.4
mask & (number < number)    a mask
constexpr * tensor          as tensor * constexpr; the other operators likewise
inline assembly             Python emulations, registered by the text of the assembly; PTX of
                            the kernels instruction by instruction (interpreted_ptx)
==========================  ==================================================================

The dot adds in the order of numpy's BLAS, in fp32. It is therefore closer to the exact result than
some GPUs are; take no tolerance for a GPU from it.

It also patches the language once for each function of a launch, where the interpreter does so at
every call of one, and makes the type of a value once for each shape (interpreted_types): the tests
of kernels take half the time.

This patches private names. ``install`` fails with a list of what a new Triton no longer has, and
``tests/kernels/test_interpreter.py`` checks the behaviour on every bf16 value.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.interpreted_dots import create_dot, create_dot_scaled, create_inline_asm
from tests.support.interpreted_numbers import FP8, KEPT_AS_BITS, encode, name_of, values_of
from tests.support.interpreted_ptx import register_kernels
from tests.support.interpreted_types import make_types_once

_PATCHED_METHODS = (
    "binary_op",
    "cast_impl",
    "create_clampf",
    "create_dot",
    "create_fma",
    "create_fp_to_fp",
    "create_inline_asm",
    "create_maxnumf",
    "create_minnumf",
    "create_splat",
    "ternary_op",
    "unary_op",
)


def interpreting() -> bool:
    """Whether this process interprets kernels (``TRITON_INTERPRET=1`` before importing triton)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def install() -> None:
    """Repair the interpreter of this process; safe to call twice.

    Raises:
        RuntimeError: the process does not interpret, or this Triton lacks something patched here.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    # tl.max is itself a jit function, made when triton is imported.
    if not interpreting() or not isinstance(tl.max, interpreter.InterpretedFunction):
        raise RuntimeError("TRITON_INTERPRET=1 has to be set before triton is first imported.")
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    _require(interpreter)
    builder.repaired = True
    register_kernels()
    _repair_builder(builder)
    _repair_reductions(interpreter.ReduceScanOpInterface)
    _repair_indices(interpreter)
    _repair_constants(tl.constexpr)
    _patch_once_per_launch(interpreter)
    make_types_once(interpreter, tl)
    _repair_dot_scaled_of_3_6()
    _forget_the_device()


def _forget_the_device() -> None:
    """Kernels that ask for their target have none, on a machine with a GPU too."""
    from triton.language import target_info

    target_info.current_target = lambda: None


def _require(interpreter: Any) -> None:
    missing = [m for m in _PATCHED_METHODS if not hasattr(interpreter.InterpreterBuilder, m)]
    names = (
        "GridExecutor",
        "InterpretedFunction",
        "ReduceScanOpInterface",
        "_LangPatchScope",
        "_get_np_dtype",
        "_implicit_cvt",
        "_patch_lang",
        "_patch_lang_tensor",
    )
    missing += [name for name in names if not hasattr(interpreter, name)]
    if missing:
        import triton

        raise RuntimeError(
            f"The interpreter of triton {triton.__version__} has no {', '.join(missing)}: "
            "tests/support/interpreter.py has to be adapted to this version."
        )


def _repair_builder(builder: Any) -> None:
    from triton.runtime import interpreter

    for method in ("unary_op", "binary_op", "ternary_op"):
        setattr(builder, method, _on_values(getattr(builder, method)))
    builder.cast_impl = _cast_impl(builder.cast_impl)
    builder.create_fp_to_fp = _create_fp_to_fp
    builder.create_dot = create_dot(builder.create_dot)
    builder.create_dot_scaled = create_dot_scaled
    builder.create_fma = _create_fma
    builder.create_inline_asm = create_inline_asm
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_splat = _create_splat(builder.create_splat)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_clampf = _create_clampf
    builder.get_bf16 = lambda self, value: interpreter.TensorHandle(
        encode(np.array([value]), "bf16"), _bf16()
    )


def _bf16() -> Any:
    import triton.language as tl

    return tl.bfloat16


def _on_values(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let an elementwise method see bf16 as fp32 values, and round what it returns."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def fixed(self: Any, *arguments: Any) -> Any:
        handles = [a for a in arguments if isinstance(a, TensorHandle)]
        names = {name_of(h) for h in handles if h.data.dtype != np.bool_ and not h.dtype.is_ptr()}
        if arguments[-1] is np.where or names.isdisjoint(KEPT_AS_BITS):
            return method(self, *arguments)
        if not names.isdisjoint(FP8):
            raise TypeError(f"no arithmetic on {sorted(names)}: cast to tl.float32 first")
        operands = [
            TensorHandle(values_of(a), tl.float32) if isinstance(a, TensorHandle) else a
            for a in arguments
        ]
        result = method(self, *operands).data
        if result.dtype == np.bool_:
            return TensorHandle(result, tl.int1)
        return TensorHandle(encode(result, "bf16"), tl.bfloat16)

    return fixed


def _cast(source: Any, target: Any, towards_zero: bool = False) -> Any:
    from triton.runtime.interpreter import TensorHandle

    if name_of(source) == "fp64" and target.name != "fp64":
        raise NotImplementedError("casts from fp64 round twice here: cast to tl.float32 first")
    values = values_of(source)
    if target.name == "fp64" or not target.is_floating():
        wanted = np.float64 if target.is_floating() else getattr(np, target.name, np.bool_)
        return TensorHandle(values.astype(wanted), target)
    bits = encode(values.astype(np.float32), target.name, towards_zero)
    if target.name in KEPT_AS_BITS:
        return TensorHandle(bits, target)
    return TensorHandle(bits.view({"fp16": np.float16, "fp32": np.float32}[target.name]), target)


def _cast_impl(stock: Callable[..., Any]) -> Callable[..., Any]:
    def fixed(self: Any, source: Any, target: Any) -> Any:
        if {name_of(source), target.scalar.name}.isdisjoint(KEPT_AS_BITS):
            return stock(self, source, target)
        return _cast(source, target.scalar)

    return fixed


def _create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    from triton._C.libtriton import ir

    return _cast(source, target.scalar, towards_zero=rounding_mode == ir.ROUNDING_MODE.RTZ)


def _create_splat(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A comparison's result keeps the type of what was compared, and would be repeated in that."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def fixed(self: Any, shape: Any, value: Any) -> Any:
        if value.data.dtype == np.bool_:
            value = TensorHandle(value.data, tl.int1)
        return stock(self, shape, value)

    return fixed


def _create_clampf(self: Any, x: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
    from triton._C.libtriton import ir

    if propagate_nan == ir.PROPAGATE_NAN.NONE:
        return self.create_minnumf(self.create_maxnumf(x, low), high)
    return self.ternary_op(x, low, high, np.clip)


def _create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """X * y + z, rounded once: an fp64 sum rounded to odd can be rounded again without harm."""
    from triton.runtime.interpreter import TensorHandle

    if z.data.dtype not in (np.float16, np.float32):
        raise TypeError(f"tl.fma of {z.dtype} is not modelled: cast to tl.float32 first")
    product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    words = np.atleast_1d(total).view(np.int64).copy()
    inexact = np.atleast_1d(np.isfinite(error) & (error != 0)) & (words & 1 == 0)
    # One step away from zero where the error has the sign of the total, towards zero otherwise.
    step = np.where((np.atleast_1d(error) > 0) == (np.atleast_1d(total) > 0), 1, -1)
    words += np.where(inexact, step, 0)
    return TensorHandle(
        words.view(np.float64).reshape(np.shape(total)).astype(z.data.dtype), z.dtype
    )


def _repair_reductions(interface: Any) -> None:
    stock = interface.check_tensor

    def fixed(self: Any, tensors: Any) -> None:
        stock(self, tensors)
        for tensor in tensors:
            if tensor.dtype.scalar.name in KEPT_AS_BITS:
                raise TypeError(
                    f"reductions of {tensor.dtype} depend on the order of addition: cast to "
                    "tl.float32 first"
                )

    interface.check_tensor = fixed


def _repair_indices(interpreter: Any) -> None:
    stock = interpreter._patch_lang_tensor

    def fixed(tensor: Any, *arguments: Any) -> Any:
        result = stock(tensor, *arguments)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).item())
        return result

    interpreter._patch_lang_tensor = fixed


def _repair_constants(constexpr: Any) -> None:
    """A constant on the left leaves the operation to the tensor on the right.

    The compiler does that; the interpreter makes a constexpr that holds a tensor.
    """
    import triton.language as tl

    def fixed(stock: Any) -> Any:
        def operate(self: Any, other: Any) -> Any:
            return NotImplemented if isinstance(other, tl.tensor) else stock(self, other)

        return operate

    names = "add sub mul mod truediv floordiv and or xor lshift rshift lt le gt ge eq ne"
    for name in names.split():
        setattr(constexpr, f"__{name}__", fixed(getattr(constexpr, f"__{name}__")))


def _patch_once_per_launch(interpreter: Any) -> None:
    import triton.language as tl

    patched: set[Any] = set()
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang

    def call_kernel(self: Any, *arguments: Any, **keywords: Any) -> Any:
        patched.clear()
        # GPUs overflow without a word.
        with np.errstate(all="ignore"):
            return launch(self, *arguments, **keywords)

    def patch_language(function: Any) -> Any:
        if function in patched:
            return interpreter._LangPatchScope()
        patched.add(function)
        scope = patch(function)
        tl.dtype.to_ir = _with_e4m3fnuz(tl.dtype.to_ir)
        return scope

    interpreter.GridExecutor.__call__ = call_kernel
    interpreter._patch_lang = patch_language


def _with_e4m3fnuz(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A dtype's way to the builder's, which in triton 3.6 forgets one type."""

    def to_ir(self: Any, builder: Any) -> Any:
        return builder.get_fp8e4b8_ty() if self.name == "fp8e4b8" else stock(self, builder)

    return to_ir


def _repair_dot_scaled_of_3_6() -> None:
    """Triton 3.6 reads ``lhs_format.value``; interpreted kernels pass plain strings."""
    import triton
    import triton.language as tl
    from triton.language.semantic import TritonSemantic

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) > (3, 6):
        return
    stock = TritonSemantic.dot_scaled

    def fixed(self: Any, lhs: Any, lhs_scale: Any, lhs_format: Any, *rest: Any) -> Any:
        rhs, rhs_scale, rhs_format, *others = rest
        lhs_format, rhs_format = tl.constexpr(lhs_format), tl.constexpr(rhs_format)
        return stock(self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, *others)

    TritonSemantic.dot_scaled = fixed
