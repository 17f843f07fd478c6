"""Every case, and the settings in which they are run."""

from __future__ import annotations

import os
from functools import partial

import torch

from bench.support import activations, gemms, host, invariance, models
from bench.support.contest import Case, Setting
from bench.support.machine import l2_bytes, measure_ceilings
from bench.support.timing import Clock, GraphClock, WallClock
from mokernels.ops.target import Target, target_of
from mokernels.ops.tuned import tables_of

GROUPS = {
    "decode": models.decode_cases,
    "linear": gemms.linear_cases,
    "activation": activations.activation_cases,
    "layer": models.layer_cases,
    "product": gemms.product_cases,
    "invariant": invariance.invariant_cases,
    "host": host.host_cases,
    "plan": host.plan_cases,
    "cpu": models.cpu_cases,
}
"""Makers of cases, by the name that the command line knows them by."""


def cases(*groups: str) -> list[Case]:
    """The cases of these groups, of all by default; the most valuable ones first."""
    found = [case for group in groups or GROUPS for case in GROUPS[group]()]
    return sorted(found, key=lambda case: case.tier)


def one_of_each(group: str) -> list[Case]:
    """One case for each way to build one: at a tiny size other shapes run the same code."""
    found: dict[tuple[object, ...], Case] = {}
    for case in GROUPS[group]():
        facts = case.facts
        sizes = (f" {facts.get('n')}x", " K=", " M=", " batch ")
        operation = case.name
        for size in sizes:
            operation = operation.split(size)[0]
        prompt = facts.get("tokens_per_call", 1) > 16
        # A model and its size do not matter when it is tiny; a prompt needs no second format.
        key = ("prompt",) if prompt else (facts.get("format"), "model" in facts or operation)
        found.setdefault(key, case)
    return list(found.values())


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
    return note_on_launches(target_of(device))


def note_on_launches(target: Target) -> str:
    """Whether anything but the closed form chooses launches here."""
    dates = [table.date for _, table in tables_of(target)]
    if not dates:
        return "Every launch is the closed form's choice."
    return (
        "Launches are those that `mokernels tune` found fastest on "
        f"{' and '.join(dates)}, where it has measured; else the closed form's choice."
    )


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


def small_setting(device: torch.device) -> Setting:
    """Every case at a size that takes no time: to try the benchmarks, not the machine.

    On a GPU graphs are captured and Inductor compiles, as when it counts; on a CPU, where that
    takes most of the time, functions are only traced.
    """
    on_gpu = device.type == "cuda"
    clock = GraphClock(rounds=2, seconds=0.0) if on_gpu else WallClock(rounds=2, seconds=0.0)
    backend = "inductor" if on_gpu else "eager"
    ceilings = partial(measure_ceilings, device, clock, buffer_bytes=2**16, side=64)
    host = WallClock(rounds=2, seconds=0.0)
    return Setting(device, clock, host, ceilings, backend=backend, small=True)
