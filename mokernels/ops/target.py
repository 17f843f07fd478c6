"""What a device can do, as questions about features; the only place that knows architectures.

Answers are kept, since every eager call asks some of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch

from mokernels.errors import BackendError

Backend = Literal["cuda", "hip", "xpu"]


@dataclass(frozen=True)
class Target:
    """A kind of device that kernels are chosen for and compiled for.

    Attributes:
        backend: Triton's name of the compiler backend.
        arch: compute capability as an int (90 for sm_90), or AMD's architecture name.
        processors: streaming multiprocessors or compute units; only sizes grids and splits.
        shared_memory: bytes of shared memory that one program may use.
        device: name of the very device, for what was measured on it; empty for a kind of device.
    """

    backend: Backend
    arch: int | str
    processors: int
    shared_memory: int
    device: str = ""

    @property
    def name(self) -> str:
        """``sm_90``, ``gfx942``, ``xpu``."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)

    @cached_property
    def has_fp8_type(self) -> bool:
        """Triton accepts e4m3fn pointers and casts; elsewhere codes are bytes, decoded by bits."""
        return (self._cuda_at_least(89)) or self.arch == "gfx950"

    @cached_property
    def has_fp8_dot(self) -> bool:
        """The matrix units multiply E4M3 by E4M3, in one of its two forms."""
        return self.has_fp8_type or self.has_fnuz_dot

    @cached_property
    def has_fnuz_dot(self) -> bool:
        """The matrix units multiply e4m3fnuz (CDNA 3), in which e4m3fn's bits have half its values.

        Two codes have another meaning: that of -0 is NaN, and those of NaN are +-240.
        """
        return self.arch == "gfx942"

    @cached_property
    def casts_fp8_once(self) -> bool:
        """A cast from fp32 to e4m3fn rounds once. Triton 3.6 goes through fp16 on sm_89."""
        return self._cuda_at_least(90)

    @cached_property
    def has_nvfp4_dot(self) -> bool:
        """The matrix units multiply NVFP4, its block scales included (tcgen05, mma.sync)."""
        return self._cuda_at_least(100)

    @cached_property
    def has_mxfp8_dot(self) -> bool:
        """The matrix units multiply MXFP8, its exponents included (the same, and CDNA 4)."""
        return self.has_nvfp4_dot or self.arch == "gfx950"

    @cached_property
    def copies_scales(self) -> bool:
        """The matrix units copy scales from shared memory, in an order of theirs (tcgen05)."""
        return self.arch in (100, 103)

    @cached_property
    def has_tma(self) -> bool:
        """A unit copies blocks of matrices to shared memory by descriptors (Hopper and later)."""
        return self._cuda_at_least(90)

    @cached_property
    def has_dependent_launch(self) -> bool:
        """A kernel may begin while the one before it ends, and wait for it (Hopper and later)."""
        return self._cuda_at_least(90)

    @cached_property
    def wants_swapped_operands(self) -> bool:
        """Few tokens have to be the N side of the matrix instruction, the weight its M side.

        On sm_90 and sm_100 the FP8 instructions need 64 (128) rows of M; Triton compiles a smaller
        BLOCK_M to fp16 instructions with converted operands.
        """
        return self.arch in (90, 100, 103)

    @cached_property
    def promotes_accumulator(self) -> bool:
        """FP8 products are summed with fewer bits than fp32 unless promoted every 128 (Hopper)."""
        return self.arch == 90

    def _cuda_at_least(self, capability: int) -> bool:
        return self.backend == "cuda" and int(self.arch) >= capability


SM_80 = Target("cuda", 80, 108, 163 * 1024)
SM_89 = Target("cuda", 89, 128, 99 * 1024)
SM_90 = Target("cuda", 90, 132, 227 * 1024)
SM_100 = Target("cuda", 100, 148, 227 * 1024)
SM_120 = Target("cuda", 120, 170, 99 * 1024)
GFX942 = Target("hip", "gfx942", 304, 64 * 1024)
GFX950 = Target("hip", "gfx950", 256, 160 * 1024)

CUDA_TARGETS = (SM_80, SM_89, SM_90, SM_100, SM_120)
HIP_TARGETS = (GFX942, GFX950)


@cache
def target_of(device: torch.device) -> Target:
    """The target of a CUDA, HIP or XPU device.

    Raises:
        BackendError: the device is of another type, or too old for the kernels (below sm_80).
    """
    if device.type == "xpu":
        found = torch.xpu.get_device_properties(device)
        return Target("xpu", "xpu", found.gpu_subslice_count, 64 * 1024, found.name)
    if device.type != "cuda":
        raise BackendError(
            f"mokernels has no Triton kernels for device {str(device)!r}: wanted a CUDA, ROCm or "
            "XPU device. On the CPU the operators run their reference implementation by themselves."
        )
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        shared = 160 * 1024 if arch == "gfx950" else 64 * 1024
        return Target("hip", arch, count, shared, properties.name)
    capability = 10 * properties.major + properties.minor
    if capability < 80:
        raise BackendError(
            f"{properties.name} has compute capability {properties.major}.{properties.minor}; "
            "mokernels' kernels need at least 8.0 (Ampere). Run the model on the CPU instead."
        )
    shared = properties.shared_memory_per_block_optin
    return Target("cuda", capability, count, shared, properties.name)


@cache
def has_dependent_launch(device: torch.device) -> bool:
    """:attr:`Target.has_dependent_launch` of a device; False of a CPU, where kernels are
    interpreted.
    """
    return device.type == "cuda" and target_of(device).has_dependent_launch
