"""Compile a planned launch for any target, with no GPU: what the compiler made of it, as text.

Nothing is executed. What can be read off is which instructions were chosen, whether registers were
spilled and how much shared memory a program takes; not speed, and not the numbers of a device.
"""

from __future__ import annotations

import datetime
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from io import StringIO
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import Target
from tests.support.interpreter import interpreting

Level = Literal["quick", "ci", "all"]
LEVELS: tuple[Level, ...] = ("quick", "ci", "all")
SAMPLE = 20
"""Cases that the level ``ci`` adds to those of ``quick``."""


@dataclass(frozen=True)
class Case:
    """One configuration to compile.

    Attributes:
        family: kernels that share their choices; ``quick`` compiles one case of each and target.
        target: what to compile for.
        name: tells the cases of a family and target apart.
        plan: makes the launch, from meta tensors.
        aligned: whether every row starts at a multiple of 16 bytes, so that loads can be wide.
    """

    family: str
    target: Target
    name: str
    plan: Callable[[], Launch]
    aligned: bool = True

    def __str__(self) -> str:
        return f"{self.family}-{self.target.name}-{self.name}"


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one target.

    Attributes:
        name: of the kernel.
        target: what it was compiled for.
        ttgir: Triton's own intermediate code.
        ptx: NVIDIA's virtual assembly; empty for AMD.
        amdgcn: AMD's assembly; empty for NVIDIA.
        cubin: NVIDIA's machine code; empty for AMD.
        shared: bytes of shared memory of a program.
    """

    name: str
    target: Target
    ttgir: str
    ptx: str
    amdgcn: str
    cubin: bytes
    shared: int

    @cached_property
    def sass(self) -> str:
        """NVIDIA's machine code as text; empty for AMD."""
        return self._dump("-sass") if self.cubin else ""

    @cached_property
    def stack(self) -> int:
        """Bytes of local memory of a thread; not 0 when registers are spilled."""
        if self.amdgcn:
            return self._number(self.amdgcn, r"\.private_segment_fixed_size:\s*(\d+)")
        return self._number(self._dump("-res-usage"), r"STACK:(\d+)")

    @property
    def spills(self) -> bool:
        """Whether registers went to memory."""
        if self.amdgcn:
            return self.stack > 0 or "vgpr_spill_count: 0" not in " ".join(self.amdgcn.split())
        return self.stack > 0 or bool(re.search(r"\b(LDL|STL)\b", self.sass))

    def _number(self, text: str, pattern: str) -> int:
        found = re.search(pattern, text)
        if found is None:
            raise AssertionError(f"{self.name}: no {pattern!r} in the compiler's report")
        return int(found[1])

    def _dump(self, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [str(_nvidia_tools() / "cuobjdump"), option, file.name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout + done.stderr


@dataclass(frozen=True)
class _Driver:
    """Of a device that is not there."""

    target: Any

    def get_current_target(self) -> Any:
        return self.target


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compile what ``launch.run()`` would run on a device of this target.

    Triton 3.6 converts E4M3 to bf16 on every target as on the first one that a process compiles
    for, which sm_89 may lack the instruction for: there each is compiled in a process of its own.

    Args:
        launch: its tensors may be meta tensors, which count as 16-byte aligned.
        target: CUDA or HIP.
    """
    import triton

    if triton.__version__.startswith("3.6."):
        return _in_a_child(partial(_compile, launch, target))
    return _compile(launch, target)


def _in_a_child(make: Callable[[], Compiled]) -> Compiled:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def send() -> None:
        try:
            there.send((make(), ""))
        except BaseException as error:
            there.send((None, f"{type(error).__name__}: {error}"))

    child = context.Process(target=send)
    child.start()
    there.close()
    made, problem = here.recv()
    child.join()
    if made is None:
        raise RuntimeError(problem)
    return made


def _compile(launch: Launch, target: Target) -> Compiled:
    import triton
    from triton.compiler import ASTSource, make_backend
    from triton.runtime import driver
    from triton.runtime.jit import create_function_from_signature

    if interpreting():
        raise RuntimeError("an interpreting process cannot compile: unset TRITON_INTERPRET")
    kernel, gpu = launch.kernel, _gpu_target(target)
    backend = make_backend(gpu)
    keywords = {
        **launch.options(target.has_dependent_launch),
        "debug": False,
        "sanitize_overflow": False,
    }
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **keywords)
    packed = kernel._pack_args(backend, keywords, bound, specialization, options)
    options, signature, constants, attributes = packed
    source = ASTSource(kernel, signature, constants, attributes)
    # Kernels that ask for their target are told that of the process. On an error of the assembler
    # Triton prints the whole program.
    with patch.object(driver, "_active", _Driver(gpu)), redirect_stdout(StringIO()):
        compiled = triton.compile(source, target=gpu, options=options.__dict__)
    return Compiled(
        name=kernel.__name__,
        target=target,
        ttgir=compiled.asm["ttgir"],
        ptx=compiled.asm.get("ptx", ""),
        amdgcn=compiled.asm.get("amdgcn", ""),
        cubin=compiled.asm.get("cubin", b""),
        shared=compiled.metadata.shared,
    )


def select_cases(cases: Iterable[Case], level: Level, day: int) -> list[Case]:
    """The cases that a level compiles.

    ``quick``: the first of each family and target. ``ci``: those, and ``SAMPLE`` of the others,
    different ones every day of the year until all had their turn. ``all``: all.
    """
    cases = list(cases)
    if level == "all":
        return cases
    seen: set[tuple[str, Target]] = set()
    first, others = [], []
    for case in cases:
        (others if (case.family, case.target) in seen else first).append(case)
        seen.add((case.family, case.target))
    if level == "quick" or len(others) <= SAMPLE:
        return first if level == "quick" else cases
    start = day * SAMPLE
    return first + [others[i % len(others)] for i in range(start, start + SAMPLE)]


def day_of_year() -> int:
    """Today's number in the year, in UTC: every worker of a run gets the same sample."""
    return datetime.datetime.now(datetime.UTC).timetuple().tm_yday


def _gpu_target(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)


def _nvidia_tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
