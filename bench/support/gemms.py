"""Cases: quantize and multiply in one operator, and the FP8 product alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.support import peers
from bench.support.checks import close_check, product_check
from bench.support.contest import Case, Contender, Contest, Peer, Setting
from bench.support.peers import Product, nbytes, rotating
from mokernels import numerics
from mokernels.checkpoint import quantize_weight
from mokernels.formats import FORMATS
from mokernels.ops.registry import operator

SHAPES = {
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "o": (4096, 4096),
    "qkv": (6144, 4096),
}
"""[N, K] of the projections of Llama-3.1-8B, those of one input together."""

FP8_LINEAR, NVFP4_LINEAR = operator("fp8_linear"), operator("nvfp4_linear")

Leaves = Mapping[str, Tensor]
FP8_PEERS = (
    partial(peers.row_wise, fast=True),
    partial(peers.row_wise, fast=False),
    peers.bf16_matmul,
)


@dataclass(frozen=True)
class Kind:
    """A way to quantize both sides.

    Attributes:
        format: of the weight, as a checkpoint stores it.
        run: ours: (x, leaves) to the result.
        values: what x becomes when quantized, fp32: (x, leaves), by mokernels.numerics.
        dequantize: the weight's fp32 values from its leaves.
        peers: makers of peers.
        unit: matrix units that could do it fastest here.
        peer_bound: how far a peer may be from the product without quantized activations; the
            element types' own rounding is 3 % (E4M3) and 10 % (4 bits) of the result.
        target: least ratio wanted at 128 rows and fewer; None: none is stated.
        against: the peers that it speaks of.
    """

    format: str
    run: Callable[[Tensor, Leaves], Tensor]
    values: Callable[[Tensor, Leaves], Tensor]
    dequantize: Callable[[Leaves], Tensor]
    peers: tuple[Callable[[Product], Peer], ...]
    unit: str = "fp8"
    peer_bound: float = 0.06
    target: float | None = None
    against: tuple[str, ...] = ()


def _fp8_weight(leaves: Leaves) -> Tensor:
    return numerics.dequantize_fp8(leaves["weight"], leaves["weight_scale"])


def _nvfp4_weight(leaves: Leaves) -> Tensor:
    return numerics.dequantize_nvfp4(
        leaves["weight"], leaves["weight_scale"], leaves["weight_scale_2"]
    )


def _mxfp8_weight(leaves: Leaves) -> Tensor:
    return numerics.dequantize_mxfp8(leaves["weight"], leaves["weight_scale"])


def _static_values(x: Tensor, leaves: Leaves) -> Tensor:
    multiplier, divisor = numerics.static_fp8_scales(leaves["input_scale"].to(x.device))
    return numerics.dequantize_fp8(numerics.quantize_fp8(x, multiplier), divisor)


def _nvfp4_values(x: Tensor, leaves: Leaves) -> Tensor:
    scale = leaves["input_scale"].to(x.device)
    return numerics.dequantize_nvfp4(*numerics.quantize_nvfp4(x, scale), scale)


def _static(x: Tensor, leaves: Leaves) -> Tensor:
    return FP8_LINEAR(
        x,
        leaves["weight"],
        leaves["weight_scale"],
        leaves["input_divisor"],
        None,
        leaves["input_multiplier"],
    )


def _dynamic(name: str) -> Callable[[Tensor, Leaves], Tensor]:
    """Operators that take nothing but x, the weight and its scale."""
    overload = operator(name)  # looked up once, as the layers do: eager calls are timed
    return lambda x, leaves: overload(x, leaves["weight"], leaves["weight_scale"])


def _nvfp4(x: Tensor, leaves: Leaves) -> Tensor:
    names = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    return NVFP4_LINEAR(x, *(leaves[name] for name in names))


KINDS = {
    "fp8_per_token_linear": Kind(
        "FP8_PER_CHANNEL_PER_TOKEN",
        _dynamic("fp8_per_token_linear"),
        lambda x, _: numerics.dequantize_fp8(*numerics.quantize_fp8_per_token(x)),
        _fp8_weight,
        (*FP8_PEERS, peers.scales_left_out, peers.gemlite_fp8),
        target=1.25,
    ),
    "fp8_linear": Kind(
        "FP8",
        _static,
        _static_values,
        _fp8_weight,
        (
            partial(peers.tensor_wise, fast=True),
            partial(peers.tensor_wise, fast=False),
            peers.bf16_matmul,
        ),
        target=1.25,
    ),
    "nvfp4_linear": Kind(
        "NVFP4",
        _nvfp4,
        _nvfp4_values,
        _nvfp4_weight,
        (
            peers.bf16_matmul,
            partial(peers.row_wise, fast=True),
            peers.tinygemm_int4,
            peers.gemlite_nvfp4,
            peers.gemlite_mxfp4,
        ),
        unit="bf16",
        peer_bound=0.2,
        target=1.25,
    ),
    "mxfp8_linear": Kind(
        "MXFP8",
        _dynamic("mxfp8_linear"),
        lambda x, _: numerics.dequantize_mxfp8(*numerics.quantize_mxfp8(x)),
        _mxfp8_weight,
        (peers.bf16_matmul, partial(peers.row_wise, fast=True), peers.gemlite_mxfp8),
        unit="bf16",
    ),
    "fp8_block_linear": Kind(
        "FP8_PB_WO",
        _dynamic("fp8_block_linear"),
        lambda x, _: numerics.dequantize_fp8(*numerics.quantize_fp8_per_block(x)),
        _fp8_weight,
        (peers.block_wise, peers.deep_gemm, peers.bf16_matmul),
        target=1.25,
    ),
    "fp8_weight_only_gemm": Kind(
        "FP8_PB_WO",
        _dynamic("fp8_weight_only_gemm"),
        lambda x, _: x.float(),
        _fp8_weight,
        (peers.bf16_matmul,),
        unit="bf16",
    ),
}

ROWS = (1, 16, 64, 128, 512, 2048)


@dataclass(frozen=True)
class Recipe:
    """The FP8 product alone, of codes that are there: how the scales lie, and who else can."""

    format: str
    fast: bool
    quantize: Callable[[Product], tuple[Tensor, Tensor]]
    peers: tuple[Callable[..., Peer], ...]


RECIPES = {
    "row-wise": Recipe(
        "FP8_PER_CHANNEL_PER_TOKEN",
        False,
        lambda p: numerics.quantize_fp8_per_token(p.x),
        (partial(peers.row_wise, fast=False), partial(peers.row_wise, fast=True)),
    ),
    "row-wise fast": Recipe(
        "FP8_PER_CHANNEL_PER_TOKEN",
        True,
        lambda p: numerics.quantize_fp8_per_token(p.x),
        (partial(peers.row_wise, fast=True),),
    ),
    "tensor-wise fast": Recipe(
        "FP8",
        True,
        lambda p: (peers.quantize_static(p.x, p.static_scale), p.static_scale),
        (partial(peers.tensor_wise, fast=True),),
    ),
    "block-wise": Recipe(
        "FP8_PB_WO",
        False,
        lambda p: numerics.quantize_fp8_per_block(p.x),
        (peers.block_wise, peers.deep_gemm),
    ),
}


def linear_cases() -> Iterator[Case]:
    """Quantize and multiply: every kind, shape and number of rows."""
    for kind_name, kind in KINDS.items():
        for shape, (n, k) in SHAPES.items():
            for m in ROWS:
                yield Case(
                    name=f"{kind_name} {n}x{k} M={m}",
                    group="quantize and multiply",
                    tier=_tier(kind_name, m),
                    build=partial(linear_contest, kind_name, m, n, k),
                    facts={"format": kind.format, "projection": shape, "m": m, "n": n, "k": k},
                    target=kind.target if m <= 128 else None,
                    against=kind.against,
                )


def product_cases() -> Iterator[Case]:
    """The FP8 product alone."""
    for name, recipe in RECIPES.items():
        for shape, (n, k) in SHAPES.items():
            for m in (1, 16, 64, 2048):
                yield Case(
                    name=f"fp8_gemm {name} {n}x{k} M={m}",
                    group="FP8 product",
                    tier=4 if m in (16, 2048) else 6,
                    build=partial(_product_contest, name, m, n, k),
                    facts={"format": recipe.format, "projection": shape, "m": m, "n": n, "k": k},
                    target=0.8 if name == "block-wise" and m > 128 else 1.0,
                )


def operands(setting: Setting, m: int, n: int, k: int) -> Product:
    """Random activations and a random weight; a few thousand elements where all is small."""
    if setting.small:
        n, k = 256, 256
    generator = torch.Generator(setting.device).manual_seed(m + n + k)
    on = {"device": setting.device, "generator": generator}
    x = torch.randn(m, k, **on).to(torch.bfloat16)
    weight = (torch.randn(n, k, **on) * 0.02).to(torch.bfloat16)
    return Product(setting, x, weight)


def stored(format: str, weight: Tensor, x: Tensor) -> dict[str, Tensor]:
    """What a layer of this format holds, and what it derives when loaded."""
    calibrated = {"FP8": 448.0, "NVFP4": 6.0 * 448.0}.get(format)
    scale = None if calibrated is None else x.abs().amax().float() / calibrated
    leaves = quantize_weight(FORMATS[format], weight, input_scale=scale)
    if format == "FP8":
        pair = numerics.static_fp8_scales(leaves["input_scale"])
        leaves["input_multiplier"], leaves["input_divisor"] = pair
    if leaves["weight_scale"].dim() == 4:
        leaves["weight_scale"] = leaves["weight_scale"].squeeze(3).squeeze(1)
    return leaves


def linear_contest(
    kind_name: str, m: int, n: int, k: int, setting: Setting, *, rows: int | None = None
) -> Contest:
    """Quantize [m, k] and multiply by [n, k]; only the first ``rows`` of these, if they are given.

    The calibrated scale is that of all m.
    """
    kind, p = KINDS[kind_name], operands(setting, m, n, k)
    leaves = stored(kind.format, p.weight, p.x)
    p = replace(p, x=p.x[:rows])
    names, tensors = tuple(leaves), tuple(leaves.values())

    def run(*copy: Tensor) -> Tensor:
        return kind.run(p.x, dict(zip(names, copy, strict=True)))

    # Activations are quantized on the CPU, where the operators are their own definition.
    values = kind.values(p.x.cpu(), leaves).to(setting.device)
    return Contest(
        Contender(kind_name, rotating(setting, run, *tensors), p.work(_size(leaves), kind.unit)),
        [make(p) for make in kind.peers],
        product_check(values, kind.dequantize(leaves), fp8_units=kind.unit == "fp8"),
        _peer_check(p, kind.peer_bound),
    )


def _product_contest(name: str, m: int, n: int, k: int, setting: Setting) -> Contest:
    recipe, p = RECIPES[name], operands(setting, m, n, k)
    leaves = stored(recipe.format, p.weight, p.x)
    codes, scale = recipe.quantize(p)
    gemm, values = operator("fp8_gemm"), numerics.dequantize_fp8(codes, scale)

    def run(b: Tensor, scale_b: Tensor) -> Tensor:
        return gemm(codes, b, scale, scale_b, None, "bfloat16", recipe.fast)

    exact = product_check(values, _fp8_weight(leaves), fp8_units=True)
    # With fast accumulation 13 bits are kept over all of K: more than the exact check allows.
    roughly = close_check((values @ _fp8_weight(leaves).T).to(torch.bfloat16), 0.02)
    work = p.work(_size(leaves), "fp8", activation_bytes=1)
    calls = rotating(setting, run, leaves["weight"], leaves["weight_scale"])
    others = [make(p, quantized=True) for make in recipe.peers]
    return Contest(
        Contender(f"fp8_gemm {name}", calls, work),
        [*others, peers.bf16_matmul(p)],
        roughly if recipe.fast else exact,
        _peer_check(p, 0.06),
    )


def _peer_check(p: Product, bound: float) -> Any:
    return close_check(p.x.float() @ p.weight.float().T, bound)


def _size(leaves: Leaves) -> int:
    return nbytes([t for leaf, t in leaves.items() if leaf.startswith("weight")])


def _tier(kind: str, m: int) -> int:
    """The formats that people have, and the rows of decoding, come first."""
    first = kind in ("fp8_per_token_linear", "fp8_linear", "nvfp4_linear")
    if m in (1, 16):
        return 1 if first else 3
    if m in (128, 2048):
        return 3 if first else 5
    return 5 if first else 7
