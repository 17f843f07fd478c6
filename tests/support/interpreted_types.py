"""Types of interpreted values, made once for each shape and not once for each value.

A kernel that is compiled makes a type for each operation. One that is interpreted makes it for each
operation of each program, and that took a third of the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def make_types_once(interpreter: Any, language: Any) -> None:
    """Patch the language's block types and tensors, and the interpreter's choice of a numpy dtype.

    Args:
        interpreter: ``triton.runtime.interpreter``.
        language: ``triton.language``.
    """
    block_type, tensor = language.block_type, language.tensor
    interpreter._get_np_dtype = _numpy_of(interpreter._get_np_dtype, block_type)
    block_type.__init__ = _block_type_of(block_type.__init__)
    tensor.__init__ = _tensor_of(tensor.__init__)


def _numpy_of(stock: Callable[[Any], Any], block_type: type) -> Callable[[Any], Any]:
    def numpy_of(of: Any) -> Any:
        if isinstance(of, block_type):
            of = of.element_ty
        known = of.__dict__.get("numpy_dtype")
        if known is None:
            known = of.numpy_dtype = stock(of)
        return known

    return numpy_of


def _block_type_of(stock: Callable[..., None]) -> Callable[..., None]:
    known: dict[Any, dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = (getattr(size, "value", size) for size in shape)
        key = (*_fields_of(element_ty), *sizes)
        found = known.get(key)
        if found is None:
            stock(self, element_ty, shape)
            found = known[key] = dict(self.__dict__)
            found["of_tensors"] = {}  # one dict, of all types that are alike
        self.__dict__.update(found)

    return init


def _fields_of(element_ty: Any) -> tuple[Any, ...]:
    """What tells an element type from others: pointers cannot be hashed."""
    if not element_ty.is_ptr():
        return (element_ty,)
    return ("pointer", element_ty.element_ty, element_ty.address_space, element_ty.const)


def _tensor_of(stock: Callable[..., None]) -> Callable[..., None]:
    def init(self: Any, handle: Any, type: Any) -> None:
        known = type.__dict__.get("of_tensors")
        if known:
            self.__dict__.update(known)
            self.handle, self.type = handle, type
            return
        stock(self, handle, type)
        if known is None:
            known = type.of_tensors = {}
        known.update({name: self.__dict__[name] for name in ("shape", "numel", "dtype")})

    return init
