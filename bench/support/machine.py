"""The machine that is measured: what it is, and what it can do at most."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bench.support.timing import Clock

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Machine:
    """Which device and which software; nothing that names the computer or its folders."""

    device: str
    date: str
    torch: str
    triton: str
    transformers: str
    python: str
    threads: int
    note: str = ""

    @property
    def slug(self) -> str:
        """``nvidia-h100-80gb-hbm3-2026-01-31``: the name of a file of results."""
        name = re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        return f"{name}-{self.date}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def describe(device: torch.device, note: str = "") -> Machine:
    """The machine that this process runs on."""
    return Machine(
        device=device_name(device),
        date=datetime.now(UTC).date().isoformat(),
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        python=platform.python_version(),
        threads=torch.get_num_threads(),
        note=note,
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()}-core {platform.machine().replace('_', '-')} CPU"


def l2_bytes(device: torch.device) -> int:
    """Of the cache that copies of weights have to exceed; on a CPU weights are not rotated."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


@dataclass(frozen=True)
class Ceilings:
    """The most that this machine was seen to do, in this run.

    Attributes:
        bytes_per_second: of reading a buffer much larger than every cache.
        flops_per_second: of a large square product, by the kind of matrix unit ("fp8", "bf16"). A
            device without FP8 products has none for it.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]

    def share(self, seconds: float, flops: float, moved: float, unit: str) -> float:
        """Least time that the ceilings allow, as a share of the time taken."""
        peak = self.flops_per_second.get(unit) or self.flops_per_second["bf16"]
        return max(moved / self.bytes_per_second, flops / peak) / seconds


def measure_ceilings(
    device: torch.device, clock: Clock, *, buffer_bytes: int, side: int
) -> Ceilings:
    """Read bandwidth by adding a buffer up; matrix peaks by square products of random data."""
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    calls = {"read": [buffer.sum], "bf16": [_bf16_product(device, side)]}
    fp8 = _fp8_product(device, side)
    if fp8 is not None:
        calls["fp8"] = [fp8]
    times = clock.times({name: clock.batch(made) for name, made in calls.items()})
    flops = 2 * side**3
    peaks = {name: flops / t.median for name, t in times.items() if name != "read"}
    return Ceilings(buffer_bytes / times["read"].median, peaks)


def _bf16_product(device: torch.device, side: int) -> Any:
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    return lambda: torch.mm(a, b.t())


def _fp8_product(device: torch.device, side: int) -> Any:
    """None where the device has no FP8 matrix units (the CPU's product of codes is emulated)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return None
    a, b = (torch.randn(side, side, device=device).to(FP8) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
