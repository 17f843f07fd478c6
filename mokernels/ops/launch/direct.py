"""Launches of kernels that have been launched before, without a search for the compiled kernel.

Triton finds the compiled kernel of a call anew each time: it binds the arguments, classifies them,
parses the options, which takes the host longer than the launch. Here one tuple finds it. Equal
tuples give Triton's own classification equal inputs, so that a kernel is never launched with
arguments that it was not compiled for: the tuple holds more than Triton looks at (integers
themselves, not whether they are 1 or divisible by 16).

What is launched, and how, is Triton's own call with the same arguments, to the byte
(tests/ops/test_direct.py). Whatever is not covered goes the long way: the interpreter, descriptors
of TMA, addresses that are not divisible by 16, devices other than CUDA's, a process in which
somebody watches launches by Triton's hooks, and one whose environment says so. Triton's settings
for compiling (``TRITON_DEBUG``) are those of a kernel's first launch, and are not looked at again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mokernels.settings import remembers_launches

REMEMBERS = remembers_launches()
"""Whether launches may be remembered in this process."""
MOST = 4096
"""Launches that are remembered. The number of rows is part of what tells them apart, and prompts
have any; beyond this many all are forgotten, which costs each one long launch."""

Found = tuple[Any, tuple[Any, ...]]
"""A compiled kernel, which lives as long as it is remembered, and its compile-time arguments."""
_FOUND: dict[tuple[Any, ...], Found] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    constants: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    """Launch on the current device and stream.

    Args:
        kernel: the ``@triton.jit`` function; its compile-time arguments come last.
        grid: number of programs along three axes.
        args: run-time arguments in the kernel's order.
        constants: compile-time arguments by name.
        options: how to compile and launch, by Triton's names.
    """
    key = _key(kernel, args, constants, options)
    if key is None or go_through_triton((kernel,)):
        kernel[grid](*args, **constants, **options)
        return
    found = _FOUND.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants, **options)
        _remember(key, kernel, compiled, len(args), constants)
        return
    compiled, last = found
    launch_compiled(compiled, grid, current_stream(key[1]), (*args, *last))


def launch_compiled(
    compiled: Any, grid: tuple[int, int, int], stream: int, args: tuple[Any, ...]
) -> None:
    """Launch what Triton compiled; ``args`` are all, those of compile time last."""
    # After the metadata: what hooks are told, and the hooks.
    how = (stream, compiled.function, compiled.packed_metadata, None, None, None)
    compiled.run(*grid, *how, *args)


def find(
    kernel: Any, args: tuple[Any, ...], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> Found | None:
    """The compiled kernel of a launch that is remembered, on the current device."""
    key = _key(kernel, args, constants, options)
    return None if key is None else _FOUND.get(key)


def go_through_triton(kernels: Iterable[Any]) -> bool:
    """Whether launches have to, of all kernels or of one of these.

    Somebody wants to see them, or the environment says so.
    """
    hooked = any(kernel.pre_run_hooks for kernel in kernels)
    return hooked or not REMEMBERS or _all_go_through_triton()


def current_device() -> int:
    """The number of the device that launches go to."""
    device: int = driver.active.get_current_device()
    return device


def current_stream(device: int) -> int:
    """The handle of a device's current stream."""
    stream: int = driver.active.get_current_stream(device)
    return stream


def _key(
    kernel: Any, args: tuple[Any, ...], constants: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    """What tells compiled kernels apart; None if it cannot be told here."""
    if not isinstance(kernel, JITFunction):
        return None
    told: list[Any] = [kernel.fn, current_device()]
    if _describe(args, told) & 15:
        return None
    return (*told, *constants, *constants.values(), *options.values())


def _describe(args: tuple[Any, ...], told: list[Any]) -> int:
    """Append what Triton may look at; returns all addresses or'ed, odd where it cannot be told."""
    addresses = 0
    for argument in args:
        if argument is None or type(argument) is int:
            told.append(argument)
        elif type(argument) is float:
            told.append(float)  # which is all that Triton looks at; an int may equal it
        elif isinstance(argument, Tensor):
            addresses |= argument.data_ptr()
            told.append(argument.dtype)
        elif type(argument) is tuple:
            told.append(len(argument))
            addresses |= _describe(argument, told)
        else:
            return 1
    return addresses


def _all_go_through_triton() -> bool:
    """Whether somebody wants to see every launch, or what is compiled."""
    runtime = knobs.runtime
    return bool(
        _calls(runtime.launch_enter_hook)
        or _calls(runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook is not None
    )


def _calls(hook: Any) -> bool:
    # A chain of hooks; None or a function where somebody has put that in its place.
    return hook is not None and bool(getattr(hook, "calls", True))


def _remember(
    key: tuple[Any, ...], kernel: Any, compiled: Any, given: int, constants: Mapping[str, Any]
) -> None:
    last = tuple(parameter.name for parameter in kernel.params[given:])
    on_cuda = driver.active.get_current_target().backend == "cuda"
    if compiled is None or not on_cuda or set(last) != set(constants):
        return
    if len(_FOUND) >= MOST:
        _FOUND.clear()
    _FOUND[key] = compiled, tuple(constants[name] for name in last)
