"""Cases: what one eager call costs the host, on tensors so small that nothing else counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from bench.support import gemms, peers
from bench.support.checks import close_check, product_check
from bench.support.contest import Case, Contender, Contest, Peer, Setting, Work
from bench.support.timing import Call
from mokernels import numerics
from mokernels.formats import FORMATS, Activation
from mokernels.ops.target import SM_90

SIDE = 128
NOTHING = Work(0.0, 0.0)
# Operators that quantize inside the product launch one kernel, as _scaled_mm does; the others two.
ONE_LAUNCH = ("fp8_linear", "fp8_per_token_linear", "fp8_weight_only_gemm")
ACTIVATIONS = {
    "fp8_per_token_linear": Activation.FP8_PER_TOKEN,
    "fp8_linear": Activation.FP8_STATIC,
    "nvfp4_linear": Activation.NVFP4,
    "mxfp8_linear": Activation.MXFP8,
    "fp8_block_linear": Activation.FP8_BLOCK,
    "fp8_weight_only_gemm": Activation.NONE,
}


def host_cases() -> Iterator[Case]:
    for name in gemms.KINDS:
        yield Case(
            name=f"eager call of {name}",
            group="host time of one eager call, M=1 N=K=128",
            tier=3,
            build=partial(_contest, name),
            facts={"operator": name, "m": 1, "n": SIDE, "k": SIDE},
            target=1.0 if name in ONE_LAUNCH else 17 / 25,
            against=("_scaled_mm tensor-wise",),
            device="any",
            host=True,
        )


def plan_cases() -> Iterator[Case]:
    """The part of an eager call that is Python of ours: choosing and describing its launches."""
    for name in ACTIVATIONS:
        for m in (1, 2048):
            yield Case(
                name=f"planning {name} M={m}",
                group="host time of planning the launches of one call for an H100, N=K=128",
                tier=3,
                build=partial(_plan_contest, name, m),
                facts={"operator": name, "m": m, "n": SIDE, "k": SIDE},
                device="any",
                host=True,
            )


def _plan_contest(name: str, m: int, setting: Setting) -> Contest:
    from mokernels.ops.launch.layer import plan_layer

    format = FORMATS[gemms.KINDS[name].format]
    x = torch.randn(m, SIDE, device=setting.device).to(torch.bfloat16)
    weight = (torch.randn(SIDE, SIDE, device=setting.device) * 0.02).to(torch.bfloat16)
    leaves = gemms.stored(format.name, weight, x)
    leaves["input_scale"] = leaves.get("input_divisor", leaves.get("input_scale"))

    def plan() -> Tensor:
        return plan_layer(format, ACTIVATIONS[name], x, leaves, target=SM_90)[0]

    def shape(result: Tensor) -> float:
        return 0.0 if (result.shape, result.dtype) == ((m, SIDE), x.dtype) else math.inf

    alone = "allocating its result alone"
    allocation = _entry(alone, lambda: x.new_empty(m, SIDE))
    return Contest(_entry(name, plan), [Peer(alone, lambda: allocation)], shape, shape)


def _contest(name: str, setting: Setting) -> Contest:
    kind = gemms.KINDS[name]
    x = torch.randn(1, SIDE, device=setting.device).to(torch.bfloat16)
    weight = (torch.randn(SIDE, SIDE, device=setting.device) * 0.02).to(torch.bfloat16)
    leaves = gemms.stored(kind.format, weight, x)
    values = kind.values(x.cpu(), leaves).to(setting.device)
    codes, scale = peers.quantize_rows(x)
    row_codes, row_scale = peers.row_weight(weight)
    static_scale = x.abs().amax().float() / 448
    static_codes = peers.quantize_static(x, static_scale)
    tensor_codes, tensor_scale = numerics.quantize_fp8_tensor_weight(weight)

    def tensor_wise() -> Contender:
        call = partial(peers.multiply, static_codes, tensor_codes, static_scale, tensor_scale, True)
        return _entry("_scaled_mm tensor-wise", call)

    def row_wise() -> Contender:
        call = partial(peers.multiply, codes, row_codes, scale, row_scale, True)
        return _entry("_scaled_mm row-wise", call)

    def mm() -> Contender:
        return _entry("torch.mm bf16", partial(torch.mm, x, weight.t()))

    expected = x.float() @ weight.float().T
    return Contest(
        _entry(name, lambda: kind.run(x, leaves)),
        [
            Peer("_scaled_mm tensor-wise", tensor_wise),
            Peer("_scaled_mm row-wise", row_wise),
            Peer("torch.mm bf16", mm),
        ],
        product_check(values, kind.dequantize(leaves), fp8_units=kind.unit == "fp8"),
        close_check(expected, 0.2),
    )


def _entry(name: str, call: Call) -> Contender:
    return Contender(name, [call], NOTHING)
