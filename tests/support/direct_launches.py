"""Launches the long and the direct way over a stub of libcuda; prints what was seen as JSON.

``python -m tests.support.direct_launches FOLDER``, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from mokernels.ops.launch import direct
from mokernels.ops.launch.gemm import plan_fp8_gemm, plan_fp8_weight_only
from mokernels.ops.launch.linear import (
    plan_fp8_block_linear,
    plan_fp8_linear,
    plan_fp8_per_token_linear,
    plan_mxfp8_linear,
    plan_nvfp4_linear,
)
from mokernels.ops.launch.plan import Launch
from mokernels.ops.target import SM_90
from tests.support.stub_driver import Stub

N, K = 256, 512


def plans() -> Iterator[tuple[str, Callable[[int], tuple[Launch, ...]]]]:
    """Launches of some operators for as many rows as are asked for."""
    codes, scale = torch.zeros(N, K, dtype=torch.float8_e4m3fn), torch.ones(())
    blocks, columns = torch.ones(N // 128, K // 128), torch.ones(N)
    packed = torch.zeros(N, K // 2, dtype=torch.uint8)
    e8m0 = torch.full((N, K // 32), 127, dtype=torch.uint8)
    e4m3 = codes[:, : K // 16]
    bias = torch.zeros(N, dtype=torch.bfloat16)
    on = {"target": SM_90}

    def x(m: int) -> torch.Tensor:
        return torch.zeros(m, K, dtype=torch.bfloat16)

    yield "static", lambda m: plan_fp8_linear(x(m), codes, scale, scale, bias, scale, **on)[1]
    yield "per token", lambda m: plan_fp8_per_token_linear(x(m), codes, columns, None, **on)[1]
    yield "blocks", lambda m: plan_fp8_block_linear(x(m), codes, blocks, None, **on)[1]
    yield "16 bits", lambda m: plan_fp8_weight_only(x(m), codes, blocks, None, **on)[1]
    yield (
        "nvfp4",
        lambda m: plan_nvfp4_linear(
            x(m), packed, e4m3.contiguous(), scale, scale, None, **on
        )[1],
    )  # fmt: skip
    yield "mxfp8", lambda m: plan_mxfp8_linear(x(m), codes, e8m0, None, **on)[1]
    yield (
        "product",
        lambda m: plan_fp8_gemm(
            x(m).to(codes.dtype), codes, scale, columns, None, torch.float16, **on
        )[1],
    )  # fmt: skip


class Launched:
    """Launches on the stub, and how many of them Triton searched the compiled kernel for."""

    def __init__(self, stub: Stub) -> None:
        self._stub = stub

    def __call__(self, launch: Launch) -> dict[str, Any]:
        before = self._stub.count
        with mock.patch.object(JITFunction, "run", autospec=True, side_effect=_RUN) as searched:
            launch.run()
        assert self._stub.count == before + 1
        return {**asdict(self._stub.seen()), "long": searched.call_count}

    def long(self, launch: Launch) -> dict[str, Any]:
        """As Triton launches, which also tells the stub what to expect of this launch."""
        self._stub.forget()
        compiled = launch.kernel[launch.grid](*launch.args, **launch.options())
        self._stub.expect(compiled)
        launch.kernel[launch.grid](*launch.args, **launch.options())
        return asdict(self._stub.seen())


_RUN = JITFunction.run


def compared(launched: Launched) -> dict[str, Any]:
    """Each launch the long way, the first time, and directly."""
    return {
        f"{name}, M={m}, {number}: {launch.kernel.__name__}": [
            launched.long(launch), launched(launch), launched(launch),
        ]
        for name, plan in plans()
        for m in (1, 16)
        for number, launch in enumerate(plan(m))
    }  # fmt: skip


def other_ways(launched: Launched) -> dict[str, Any]:
    """How many launches went the long way where one was remembered, by what is different."""
    make = dict(plans())["16 bits"]
    (launch,) = make(16)
    launched.long(launch)
    launched(launch)
    shifted = torch.zeros(16 * K + 1, dtype=torch.bfloat16)[1:].view(16, K)
    odd = Launch(**{**vars(launch), "args": (shifted, *launch.args[1:])})
    found = {"again": launched(launch)["long"], "shifted": launched(odd)["long"]}
    found["other warps"] = launched(Launch(**{**vars(launch), "num_warps": 8}))["long"]
    with mock.patch.object(knobs.runtime, "launch_enter_hook", print_nothing):
        found["watched"] = launched(launch)["long"]
    with mock.patch.object(launch.kernel, "pre_run_hooks", [lambda *_, **__: None]):
        found["hooked"] = launched(launch)["long"]
    found["no longer watched"] = launched(launch)["long"]
    with mock.patch.object(direct, "MOST", 1):
        launched(make(15)[0])
    found["remembered of too many"] = len(direct._FOUND)
    return found


def print_nothing(metadata: Any) -> None:
    """A hook that wants to see launches."""


def main(folder: Path) -> None:
    launched = Launched(Stub(folder))
    found = {"compared": compared(launched), "other_ways": other_ways(launched)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
