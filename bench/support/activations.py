"""Cases: a norm or a gated activation that leaves the kernel quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from bench.support import peers
from bench.support.checks import close_check
from bench.support.contest import Case, Contender, Contest, Peer, Setting, Work
from bench.support.peers import nbytes
from mokernels import numerics
from mokernels.ops.registry import operator

EPS, STYLE = 1e-5, "cast_then_scale"
NVFP4_SCALE = 8.0 / (6 * 448)  # calibrated for activations of up to 8
FP8_SCALE = 8.0 / 448


@dataclass(frozen=True)
class Quantization:
    """A way to quantize activations.

    Attributes:
        plain: (x, scale) to codes and scales in plain torch, for Inductor.
        values: (codes, scales, scale) to fp32, by mokernels.numerics.
        scale: given beforehand; None for those that take none.
    """

    plain: Callable[[Tensor, Tensor], Any]
    values: Callable[..., Tensor]
    scale: float | None = None


def _fp8_values(codes: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    return numerics.dequantize_fp8(codes, scales.squeeze(-1) if scales.shape[-1] == 1 else scales)


QUANTIZATIONS = {
    "fp8": Quantization(
        peers.quantize_static, lambda codes, scale: numerics.dequantize_fp8(codes, scale), FP8_SCALE
    ),
    "fp8_per_token": Quantization(lambda x, _: peers.quantize_rows(x), _fp8_values),
    "fp8_per_block": Quantization(lambda x, _: peers.quantize_blocks(x), _fp8_values),
    "nvfp4": Quantization(numerics.quantize_nvfp4, numerics.dequantize_nvfp4, NVFP4_SCALE),
    "mxfp8": Quantization(
        lambda x, _: numerics.quantize_mxfp8(x),
        lambda codes, scales, scale: numerics.dequantize_mxfp8(codes, scales),
    ),
}


def plain_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a decoder layer does before a projection: add, then Llama's RMSNorm."""
    total = x + residual
    wide = total.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return total, weight * wide.to(x.dtype)


def plain_gate(gate: Tensor, up: Tensor) -> tuple[Tensor]:
    """What it does before the last one."""
    return (silu(gate) * up,)


@dataclass(frozen=True)
class Producer:
    """What comes before a quantization.

    Attributes:
        operator: begin of the fused operators' names.
        plain: its tensors to its results, the last of which is quantized; plain torch.
        options: arguments of the fused operators between the tensors and the scale.
        inputs: number of tensors [M, K]; a norm also has a weight [K].
        results: number of results that are not quantized.
    """

    operator: str
    plain: Callable[..., tuple[Tensor, ...]]
    options: tuple[Any, ...]
    inputs: int
    results: int


PRODUCERS = {
    "add + RMSNorm": Producer("add_rms_norm_quantize", plain_norm, (EPS, STYLE), 2, 1),
    "silu * up": Producer("gated_quantize", plain_gate, ("silu",), 2, 0),
}


def activation_cases() -> Iterator[Case]:
    for name in PRODUCERS:
        for quantization in QUANTIZATIONS:
            for k in (4096, 14336):
                for m in (1, 16, 128, 2048):
                    yield Case(
                        name=f"{name} + {quantization} K={k} M={m}",
                        group="activations and quantization",
                        tier=_tier(name, quantization, k, m),
                        build=partial(_contest, name, quantization, m, k),
                        facts={"quantization": quantization, "m": m, "k": k},
                        target=1.0,
                        against=("Inductor",),
                    )


def _contest(name: str, quantization: str, m: int, k: int, setting: Setting) -> Contest:
    producer, how = PRODUCERS[name], QUANTIZATIONS[quantization]
    tensors = _inputs(setting, producer, m, 256 if setting.small else k)
    scale = torch.tensor(how.scale or 1.0, device=setting.device)
    extra = () if how.scale is None else (scale,)
    fused = operator(f"{producer.operator}_{quantization}")
    quantize = operator(f"quantize_{quantization}")
    plain = setting.compiled(producer.plain)

    def ours(*given: Tensor, rest: tuple[Tensor, ...] = extra) -> tuple[Tensor, ...]:
        return _listed(fused(*given, *producer.options, *rest))

    def unfused() -> tuple[Tensor, ...]:
        *kept, last = plain(*tensors)
        return (*kept, *_listed(quantize(last, *extra)))

    def whole(*given: Tensor) -> tuple[Tensor, ...]:
        *kept, last = producer.plain(*given[:-1])
        return (*kept, *_listed(how.plain(last, given[-1])))

    seen = partial(_values, how, producer.results, scale)
    on_cpu = ours(*(t.cpu() for t in tensors), rest=tuple(t.cpu() for t in extra))
    expected = _values(how, producer.results, scale.cpu(), on_cpu)
    moved = producer.inputs * nbytes(tensors[:1]) + nbytes(on_cpu)
    inductor, entry = setting.compiled(whole), partial(_entry, moved, seen)
    return Contest(
        entry("mokernels fused", lambda: ours(*tensors)),
        [
            Peer("Inductor", lambda: entry("Inductor", lambda: inductor(*tensors, scale))),
            Peer("unfused", lambda: entry("unfused", unfused)),
        ],
        # Statistics may be added in another order: a few values near a tie get the other code.
        close_check(expected, 0.01),
        # Inductor does not round to bf16 between the operations.
        close_check(expected, 0.1 if quantization == "nvfp4" else 0.05),
    )


def _entry(moved: int, seen: Callable[[Any], Any], name: str, call: Callable[[], Any]) -> Contender:
    return Contender(name, [call], Work(0.0, moved), seen)


def _inputs(setting: Setting, producer: Producer, m: int, k: int) -> tuple[Tensor, ...]:
    """Not rotated: in a model, too, activations were written a moment before."""
    generator = torch.Generator(setting.device).manual_seed(m + k)
    on = {"device": setting.device, "generator": generator}
    rows = [torch.randn(m, k, **on).to(torch.bfloat16) for _ in range(producer.inputs)]
    weight = (1 + 0.1 * torch.randn(k, **on)).to(torch.bfloat16)
    return (*rows, weight) if producer.results else tuple(rows)


def _values(
    how: Quantization, kept: int, scale: Tensor, results: tuple[Tensor, ...]
) -> list[Tensor]:
    """Results that are not quantized, and the values of those that are."""
    return [*results[:kept], how.values(*results[kept:], scale)]


def _listed(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, (list, tuple)) else (result,)


def _tier(name: str, quantization: str, k: int, m: int) -> int:
    """First what a Llama layer has: norms of 4096, gates of 14336, few rows."""
    usual = (name == "add + RMSNorm") == (k == 4096)
    first = quantization in ("fp8", "fp8_per_token", "nvfp4")
    return 2 + 2 * (not usual) + 2 * (not first) + (m >= 128)
