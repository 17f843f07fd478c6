"""How many kernels one model compiles: a bounded number, whatever numbers of rows it meets."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from mokernels.formats import FORMATS, Activation
from mokernels.ops.configs import M_BUCKETS, bucket
from mokernels.ops.kernels.gemm_persistent import gemm_persistent
from mokernels.ops.launch.fused import plan_gated_quantize, plan_norm_quantize
from mokernels.ops.launch.layer import plan_layer
from mokernels.ops.launch.plan import Launch
from mokernels.ops.quantize import QUANTIZERS
from mokernels.ops.target import CUDA_TARGETS, HIP_TARGETS, Target
from mokernels.tuning import Product
from mokernels.tuning.operands import draw_weight

LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
# Ends of buckets and their neighbours, odd numbers, multiples of 16: what kernels could notice.
ROWS = sorted(
    {1, 2, 3, 5, 7, 8, 48, 100, 112, 1000, 1024, 2047, 2048, 3001, 4096, 8191, 8192}
    | {end + offset for end in M_BUCKETS for offset in (-1, 0, 1)}
)
MOST_PRODUCTS = 16
"""Compiled GEMMs of one model in one format: about one for each range of rows, others where K is
split, a reduction for each number of parts, and one row apart, whose scale is a single number."""
MOST_QUANTIZERS = 6
"""Compiled quantizers: tiles grow with the tensor, 8 times at most."""
MOST_PRODUCERS = 8
"""Compiled norms and gated activations that quantize, of one quantizer: with and without a
residual, in one pass over a row and in two; tiles as of quantizers."""
ROWS_OF_KERNELS = ("M", "rows", "inner", "residual_inner", "up_inner")
"""Arguments that follow the number of rows."""

CASES = [
    pytest.param(target, name, activation, id=f"{target.name}-{name}-{activation.value}")
    for target in (*CUDA_TARGETS, *HIP_TARGETS)
    for name, row in FORMATS.items()
    for activation in row.activations
]


@cache
def binder(kernel: Any, target: Target) -> tuple[Any, Any]:
    backend = make_backend(
        GPUTarget(target.backend, target.arch, 32 if target.backend == "cuda" else 64)
    )
    return create_function_from_signature(kernel.signature, kernel.params, backend), backend


def variant(launch: Launch, target: Target) -> tuple[Any, ...]:
    """What Triton looks a compiled kernel up by."""
    bind, _ = binder(launch.kernel, target)
    options = launch.options(target.has_dependent_launch)
    _, specialization, _ = bind(*launch.args, **options)
    given = {name: value for name, value in options.items() if name not in launch.constants}
    return launch.kernel, str(specialization), *given.values()


@cache
def leaves_of(name: str, activation: Activation, n: int, k: int) -> dict[str, torch.Tensor]:
    # Drawn small and then only declared: shapes are all that a plan looks at.
    row = FORMATS[name]
    small = draw_weight(Product(row, activation, 128, 128), torch.device("cpu"), seed=0)
    shapes = {stored.leaf: stored.shapes[0] for stored in row.tensors(n, k)}
    found = {}
    for leaf, tensor in small.items():
        shape = tuple(size for size in shapes.get(leaf, ()) if size != 1 or tensor.dim() == 0)
        found[leaf] = torch.empty(shape, dtype=tensor.dtype, device="meta")
    return found


def launches(name: str, activation: Activation, m: int, target: Target) -> Iterator[Launch]:
    """Those of a decoder layer's projections, of one input together."""
    for n, k in LLAMA_8B.values():
        x = torch.empty(m, k, dtype=torch.bfloat16, device="meta")
        leaves = leaves_of(name, activation, n, k)
        yield from plan_layer(FORMATS[name], activation, x, leaves, target=target)[1]


def producers(quantizer: str, m: int, target: Target) -> Iterator[Launch]:
    """The norms before qkv and gate_up, the gated activation before down."""
    x, wide = (torch.empty(m, k, dtype=torch.bfloat16, device="meta") for k in (4096, 14336))
    one = torch.empty((), device="meta")
    scales = {"fp8": (one, one), "nvfp4": (one,), "nvfp4_to_bf16": (one,)}.get(quantizer, ())
    weight = torch.empty(4096, dtype=torch.bfloat16, device="meta")
    for residual in (None, x):
        given = (x, residual, weight, 1e-5, "llama", *scales)
        yield from plan_norm_quantize(quantizer, *given, target=target)[1]
    yield from plan_gated_quantize(quantizer, wide, wide, "silu", *scales, target=target)[1]


def products(found: set[tuple[Any, ...]]) -> set[tuple[Any, ...]]:
    return {v for v in found if v[0].__name__.startswith(("gemm", "gemv", "reduce"))}


@pytest.mark.parametrize(("target", "name", "activation"), CASES)
def test_a_model_compiles_a_bounded_number_of_kernels(target, name, activation):
    found = {
        variant(launch, target) for m in ROWS for launch in launches(name, activation, m, target)
    }
    multiplying = products(found)
    assert 0 < len(multiplying) <= MOST_PRODUCTS
    assert len(found - multiplying) <= MOST_QUANTIZERS


@pytest.mark.parametrize(("target", "name", "activation"), CASES)
def test_only_the_range_of_rows_matters_to_a_product(target, name, activation):
    by_range: dict[int, set[frozenset[Any]]] = {}
    for m in ROWS:
        if m > 1:  # one row may be quantized by its product, and its scale is one number
            found = {variant(launch, target) for launch in launches(name, activation, m, target)}
            by_range.setdefault(bucket(m), set()).add(frozenset(products(found)))
    assert len(by_range) == len(M_BUCKETS) + 1
    for found in by_range.values():
        # By TMA the very number of rows decides between a tile and half of it (tile_by_tma).
        by_tma = {v for v in frozenset.union(*found) if v[0] is gemm_persistent}
        assert len({others - by_tma for others in found}) == 1
        assert len(by_tma) <= 2


@pytest.mark.parametrize("target", [*CUDA_TARGETS, *HIP_TARGETS], ids=lambda target: target.name)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_what_ends_quantized_is_compiled_a_few_times(target, quantizer):
    found = {variant(launch, target) for m in ROWS for launch in producers(quantizer, m, target)}
    assert 3 <= len(found) <= MOST_PRODUCERS


def kernels() -> dict[str, Any]:
    found = {}
    for case in CASES:
        target, *layer = case.values
        for m in (1, 64, 2048):
            found |= {x.kernel.__name__: x.kernel for x in launches(*layer, m, target)}
        for quantizer in QUANTIZERS:
            found |= {x.kernel.__name__: x.kernel for x in producers(quantizer, 2, target)}
    return found


def test_no_kernel_is_compiled_for_a_number_of_rows():
    seen = kernels()
    assert {"gemm_epilogue", "gemm_block", "gemm_decode", "gemm_native", "reduce_splits"} <= set(
        seen
    )
    for name, kernel in seen.items():
        rows = [param for param in kernel.params if param.name in ROWS_OF_KERNELS]
        assert rows, name
        assert all(p.do_not_specialize and not p.is_constexpr for p in rows), name
