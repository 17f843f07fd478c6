"""Launches the long and the direct way, and replayed calls, over a stub of libcuda; as JSON.

``python -m tests.support.direct_launches FOLDER``, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

from mokernels.ops import registry
from mokernels.ops.launch import direct, fused, linear, replay
from mokernels.ops.launch.fused import plan_norm_quantize
from mokernels.ops.launch.gemm import plan_fp8_gemm, plan_fp8_weight_only
from mokernels.ops.launch.linear import (
    plan_fp8_block_linear,
    plan_fp8_linear,
    plan_fp8_per_token_linear,
    plan_mxfp8_linear,
    plan_nvfp4_linear,
)
from mokernels.ops.launch.plan import Launch, run
from mokernels.ops.launch.replay import Replayed
from mokernels.ops.target import SM_90
from tests.support.stub_driver import Stub

N, K = 256, 512


Plan = Callable[..., tuple[Tensor, tuple[Launch, ...]]]


def calls(m: int) -> Iterator[tuple[str, Plan, tuple[Any, ...]]]:
    """Some operators' plans, and arguments for m rows."""
    codes, scale = torch.zeros(N, K, dtype=torch.float8_e4m3fn), torch.ones(())
    blocks, columns = torch.ones(N // 128, K // 128), torch.ones(N)
    packed = torch.zeros(N, K // 2, dtype=torch.uint8)
    e8m0 = torch.full((N, K // 32), 127, dtype=torch.uint8)
    e4m3 = codes[:, : K // 16].contiguous()
    bias = torch.zeros(N, dtype=torch.bfloat16)
    x = torch.zeros(m, K, dtype=torch.bfloat16)
    quantized = (x.to(codes.dtype), codes, torch.ones(()), columns, None, torch.float16)
    norm = (x, x.clone(), torch.ones(K), 1e-5, "scale_then_cast")
    yield "static", plan_fp8_linear, (x, codes, scale, scale.clone(), bias, torch.ones(()))
    yield "per token", plan_fp8_per_token_linear, (x, codes, columns, None)
    yield "blocks", plan_fp8_block_linear, (x, codes, blocks, None)
    yield "16 bits", plan_fp8_weight_only, (x, codes, blocks, None)
    yield "nvfp4", plan_nvfp4_linear, (x, packed, e4m3, scale, torch.ones(()), None)
    yield "mxfp8", plan_mxfp8_linear, (x, codes, e8m0, None)
    yield "product", plan_fp8_gemm, quantized
    yield "norm", partial(plan_norm_quantize, "fp8_per_token"), norm


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
        for m in (1, 16)
        for name, plan, args in calls(m)
        for number, launch in enumerate(plan(*args, target=SM_90)[1])
    }  # fmt: skip


def replayed(stub: Stub) -> dict[str, Any]:
    """All launches of calls that are planned, and then replayed twice."""
    found = {}
    for m in (1, 16):
        for name, plan, args in calls(m):
            operator = Replayed(lambda *args, plan=plan: run(plan(*args, target=SM_90)))
            found[f"{name}, M={m}"] = [launches_of(operator, args, stub) for _ in range(3)]
    return found


def operators(stub: Stub) -> dict[str, Any]:
    """How often registered operators have checked their arguments and launched.

    After two calls, and after one more in which the environment says not to remember.
    """
    x, weight = torch.zeros(2, K, dtype=torch.bfloat16), torch.ones(K)
    codes, one = torch.zeros(N, K, dtype=torch.float8_e4m3fn), torch.ones(())
    found = {}
    for module, name, args in (
        (linear, ("fp8_linear",), (x, codes, one, one.clone(), None, torch.ones(()))),
        (fused, ("rms_norm_quantize", "mxfp8"), (x, weight, 1e-6, "cast_then_scale")),
    ):
        check = mock.Mock()
        operator = registry._launcher(check, *name)
        stub.forget()
        before = stub.count
        with (
            mock.patch.object(module, "target_of", return_value=SM_90),
            mock.patch.object(replay, "device_of", return_value=0),
        ):
            operator(*args)
            operator(*args)
            counts = [check.call_count, stub.count - before]
            with mock.patch.object(direct, "REMEMBERS", False):
                operator(*args)
        found[name[0]] = [*counts, check.call_count, stub.count - before]
    return found


def launches_of(operator: Replayed, args: tuple[Any, ...], stub: Stub) -> dict[str, Any]:
    """How often a call is planned, and what libcuda is given.

    Addresses are told as the places of the operator's arguments, or of results, that start there;
    what starts elsewhere, as what the call itself needs, as None.
    """
    seen = []

    def launch(compiled: Any, *rest: Any) -> None:
        stub.expect(compiled)
        _LAUNCH_COMPILED(compiled, *rest)
        seen.append(stub.seen())

    with (
        mock.patch.object(direct, "launch_compiled", launch),
        mock.patch.object(replay, "device_of", return_value=0),
        mock.patch.object(operator, "_call", wraps=operator._call) as planned,
    ):
        result = operator(*args)
    results = result if isinstance(result, tuple) else (result,)
    named = {t.data_ptr(): f"argument {i}" for i, t in enumerate(args) if isinstance(t, Tensor)}
    named |= {t.data_ptr(): f"result {i}" for i, t in enumerate(results)}
    told = [
        [launch.function, launch.shape, [_told(value, named) for value in launch.values]]
        for launch in seen
    ]
    return {"planned": planned.call_count, "launches": told}


def _told(value: int, named: dict[int, str]) -> int | str | None:
    return named.get(value, value if value < 1 << 32 else None)


_LAUNCH_COMPILED = direct.launch_compiled


def other_ways(launched: Launched) -> dict[str, Any]:
    """How many launches went the long way where one was remembered, by what is different."""
    (launch,) = _with_16_bits(16)
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
    with mock.patch.object(direct, "REMEMBERS", False):
        found["told not to"] = launched(launch)["long"]
    found["no longer watched"] = launched(launch)["long"]
    with mock.patch.object(direct, "MOST", 1):
        launched(*_with_16_bits(15))
    found["remembered of too many"] = len(direct._FOUND)
    return found


def _with_16_bits(m: int) -> tuple[Launch, ...]:
    plan, args = next((plan, args) for name, plan, args in calls(m) if name == "16 bits")
    return plan(*args, target=SM_90)[1]


def print_nothing(metadata: Any) -> None:
    """A hook that wants to see launches."""


def main(folder: Path) -> None:
    stub = Stub(folder)
    launched = Launched(stub)
    found = {"compared": compared(launched), "replayed": replayed(stub)}
    found["operators"] = operators(stub)
    found["other_ways"] = other_ways(launched)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
