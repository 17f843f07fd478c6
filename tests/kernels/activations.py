"""Activations that decide the corner cases of every format, and the targets they meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, Target, target_of
from tests.support.compare import assert_same_bits
from tests.support.interpreter import interpreting

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
every_float = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d)[6:])


def targets() -> list[Target]:
    """One target of each way through the kernels; on a GPU its own.

    With one processor the tiles are large, of which the interpreter needs fewer.
    """
    if not interpreting():
        return [target_of(torch.device("cuda", 0))] if torch.cuda.is_available() else []
    ways = {(t.has_fp8_type, t.casts_fp8_once): t for t in (*HIP_TARGETS, *CUDA_TARGETS)}
    return [replace(target, processors=1) for target in ways.values()]


every_target = pytest.mark.parametrize("target", targets(), ids=lambda t: t.name)


def all_bf16(rows: int = 64) -> torch.Tensor:
    """Every bf16 value once, [rows, 65536 / rows], neighbours in one row."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16).view(rows, -1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hard_rows() -> torch.Tensor:
    """Rows [14, 256] that decide the corner cases of every format, fp32."""
    noise = normal(256, dtype=torch.float32)
    tie_of_amax = torch.full((256,), 0.25)
    tie_of_amax[::16], tie_of_amax[1::16] = 6.0, -5.0
    one_hot = torch.zeros(256)
    one_hot[37] = -3.0
    nan, inf = noise.clone(), noise.clone()
    nan[5], inf[200] = math.nan, -math.inf
    infinities = torch.where(noise > 0, math.inf, -math.inf)
    return torch.stack(
        [
            torch.zeros(256),
            -torch.zeros(256),
            torch.full((256,), 2.0**-24),
            torch.full((256,), 2.0**-24 * (1 + 2**-7)),
            torch.full((256,), 1.5e-45),
            noise * 1e-38,
            noise * 1e38,
            torch.full((256,), 3.3e38),
            tie_of_amax,
            one_hot,
            nan,
            inf,
            infinities,
            torch.full((256,), math.nan),
        ]
    )


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    """What every quantizer has to get right; K a multiple of 32."""
    return [
        all_bf16().to(dtype),
        all_bf16().T.contiguous().to(dtype),
        normal(37, 416, dtype=dtype),
        hard_rows().to(dtype),
    ]


def scalar(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def assert_same_pair(result, expected) -> None:
    for name, one, other in zip(("codes", "scales"), result, expected, strict=True):
        assert one.is_contiguous(), f"the {name} are not contiguous"
        assert_same_bits(one, other.contiguous())


SCALES = st.floats(2.0**-20, 30, width=32)


@st.composite
def strided(draw: st.DrawFn, multiple: int) -> torch.Tensor:
    """A view [..., K] with up to three leading dimensions and drawn strides."""
    lead = draw(st.lists(st.integers(1, 5), max_size=3))
    k = multiple * draw(st.integers(1, max(1, 600 // multiple)))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in lead]
    pad = draw(st.sampled_from([0, 0, 1, 16]))
    dtype = draw(st.sampled_from(FLOATS))
    scale = 2.0 ** draw(st.integers(-40, 40))
    wide = normal(
        *(n * step for n, step in zip(lead, steps, strict=True)),
        k + pad,
        seed=draw(st.integers(0, 2**16)),
        dtype=torch.float32,
    )
    view = (wide * scale).to(dtype)[(*(slice(None, None, step) for step in steps),)][..., :k]
    kind = draw(st.sampled_from(["plain", "plain", "swapped", "broadcast", "columns"]))
    if kind == "swapped" and view.dim() > 2:
        view = view.transpose(0, 1)
    elif kind == "broadcast" and view.dim() > 1:
        view = view[:1].expand(view.shape)
    elif kind == "columns":
        view = view.mT.contiguous().mT if view.dim() > 1 else view
    return view


def draws(multiple: int) -> Callable[[Any], Any]:
    """Decorator: ``data`` [..., K] of any strides, K a multiple, and ``g``, a scale."""

    def decorate(test: Any) -> Any:
        return settings(max_examples=40)(given(data=strided(multiple), g=SCALES)(test))

    return decorate
