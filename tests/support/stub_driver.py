"""Triton's CUDA driver over a libcuda that runs nothing: the host's side of a launch, on a CPU.

Kernels are compiled to machine code and launched by Triton's own code, with tensors of the CPU; the
stub keeps function, grid and arguments of the last launch. For a process of its own, since Triton's
driver is replaced for good, and only beside a PyTorch without CUDA, which has no libcuda to mix up
with.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Seen:
    """One launch, as libcuda was given it."""

    function: int
    shape: tuple[int, ...]
    values: tuple[int, ...]


def why_not() -> str:
    """Why there can be no stub here; empty if there can."""
    if torch.version.cuda or torch.version.hip:
        return "the stub of libcuda is for a PyTorch without CUDA"
    if _compiler() is None:
        return "the stub of libcuda needs a C compiler, and Triton's launcher too"
    return ""


class Stub:
    """The stub, built into ``folder``, as the active driver of Triton, for sm_90."""

    def __init__(self, folder: Path) -> None:
        library = folder / "libcuda.so.1"
        include = Path(triton.__file__).parent / "backends/nvidia/include"
        source = Path(__file__).with_suffix(".c")
        flags = ["-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
        command = [str(_compiler()), *flags, "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        # Triton links with one name and loads by the other.
        (folder / "libcuda.so").symlink_to(library)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.stub_function.restype = ctypes.c_size_t
        self._library.stub_shape.restype = ctypes.POINTER(ctypes.c_uint)
        self._library.stub_values.restype = ctypes.POINTER(ctypes.c_ulonglong)
        _activate()

    def expect(self, compiled: Any) -> None:
        """The next launch is of this kernel, whose signature tells the arguments' sizes."""
        sizes = [_size(kind) for kind in _flat(compiled.src.signature.values())]
        wanted = [size for size in sizes if size]
        self._given = len(wanted)
        self._library.stub_expect(self._given, (ctypes.c_int * self._given)(*wanted))

    def forget(self) -> None:
        """The next launch is of any kernel, and its arguments are not looked at."""
        self._given = 0
        self._library.stub_expect(0, None)

    @property
    def count(self) -> int:
        """Launches until now."""
        return self._library.stub_count()

    def seen(self) -> Seen:
        """The last launch."""
        values = self._library.stub_values()[: self._given]
        return Seen(
            self._library.stub_function(), tuple(self._library.stub_shape()[:5]), tuple(values)
        )


def _activate() -> None:
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_stream = lambda device: 7
    triton.runtime.driver.set_active(driver)


def _flat(kinds: Any) -> list[str]:
    return [part for kind in kinds for part in (_flat(kind) if isinstance(kind, tuple) else [kind])]


def _size(kind: str) -> int:
    if kind == "constexpr":
        return 0
    return 8 if kind.startswith("*") or kind.endswith("64") else 4


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
