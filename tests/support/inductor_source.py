"""Read what Inductor writes: the sources of its Triton kernels, the launches of its wrapper."""

from __future__ import annotations

import ast
from collections.abc import Mapping

_NO_LAUNCHES = (
    "_DeviceGuard", "assert_alignment", "assert_size_stride", "clear", "copy_if_misaligned",
    "empty_strided_cuda", "get_raw_stream", "max", "min", "reinterpret_tensor", "set_device",
    "size", "stride",
)  # fmt: skip
"""Functions that a wrapper calls without work for the device."""


def kernel_sources(source: str) -> dict[str, str]:
    """``name = async_compile.triton('name', '''source''', ...)``: each kernel's source by name."""
    return {
        call.args[0].value: call.args[1].value
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) == "async_compile.triton"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[1], ast.Constant)
    }


def launches_of(source: str) -> list[str]:
    """What the wrapper launches, in order: names of Triton kernels and of operators.

    Raises:
        RuntimeError: the wrapper calls something that is not known to launch or not to launch.
    """
    kernels = kernel_sources(source)
    functions = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == "call"
    ]
    if len(functions) != 1:
        raise RuntimeError(f"wanted one function named call in the source, found {len(functions)}")
    calls = [node for node in ast.walk(functions[0]) if isinstance(node, ast.Call)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    found = (_launch(call, kernels) for call in calls)
    return [launch for launch in found if launch is not None]


def _launch(call: ast.Call, kernels: Mapping[str, str]) -> str | None:
    """The name of what this call launches, or None if it launches nothing."""
    function = ast.unparse(call.func)
    name = function.rpartition(".")[2]
    if function.removesuffix(".run") in kernels:
        return function.removesuffix(".run")
    if function.startswith("torch.ops."):
        return ".".join(function.split(".")[2:4])
    if function.startswith("extern_kernels."):
        return function
    if name in _NO_LAUNCHES:
        return None
    raise RuntimeError(
        f"Inductor's wrapper calls {function}, of which it is not known whether it launches "
        "something: add it to _NO_LAUNCHES or to _launch"
    )
