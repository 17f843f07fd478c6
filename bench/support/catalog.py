"""Every case, and the settings in which they are run."""

from __future__ import annotations

import os
from functools import partial

import torch

from bench.support import activations, gemms, host, models
from bench.support.contest import Case, Setting
from bench.support.machine import l2_bytes, measure_ceilings
from bench.support.timing import Clock, GraphClock, WallClock

GROUPS = {
    "decode": models.decode_cases,
    "linear": gemms.linear_cases,
    "activation": activations.activation_cases,
    "layer": models.layer_cases,
    "product": gemms.product_cases,
    "host": host.host_cases,
    "cpu": models.cpu_cases,
}
"""Makers of cases, by the name that the command line knows them by."""


def cases(*groups: str) -> list[Case]:
    """The cases of these groups, of all by default; the most valuable ones first."""
    found = [case for group in groups or GROUPS for case in GROUPS[group]()]
    return sorted(found, key=lambda case: case.tier)


def present_device() -> torch.device:
    """The CUDA device if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def what_runs(device: torch.device) -> str:
    """A line that says which rows this machine can measure."""
    if device.type == "cuda":
        return (
            f"bench: measures on {torch.cuda.get_device_name(device)}; rows of the CPU are left out"
        )
    return "bench: no CUDA device here, so only the rows of the CPU are measured"


def note_for(device: torch.device, small: bool) -> str:
    """What readers of the results have to know."""
    if small:
        return "TINY SHAPES: these numbers say that the benchmarks run, and nothing about speed."
    if device.type == "cpu":
        return f"Load average of the machine when the run began: {os.getloadavg()[0]:.1f}."
    return ""


def setting_for(device: torch.device, *, backend: str = "inductor") -> Setting:
    """How results are measured that are meant to be shown."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        clock: Clock = GraphClock()
        # Launches are queued, not waited for; the queue holds a thousand.
        queued = WallClock(seconds=0.002, settle=torch.cuda.synchronize, limit=200)
        size = {"buffer_bytes": 2**32, "side": 8192}
    else:
        clock = queued = WallClock(rounds=11, seconds=0.1)
        size = {"buffer_bytes": 2**28, "side": 1024}
    return Setting(
        device,
        clock,
        queued,
        partial(measure_ceilings, device, clock, **size),
        backend=backend,
        cache_bytes=l2_bytes(device),
    )


def small_setting(device: torch.device, *, backend: str = "eager") -> Setting:
    """Every case at a size that takes no time: to try the benchmarks, not the machine."""
    clock = WallClock(rounds=2, seconds=0.0)
    ceilings = partial(measure_ceilings, device, clock, buffer_bytes=2**16, side=64)
    return Setting(device, clock, clock, ceilings, backend=backend, small=True)
