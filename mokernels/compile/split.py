"""First rewrite: a linear operator becomes a quantization and a GEMM, which fuse separately.

======================  =========================  ==========================================
linear operator         quantization               GEMM
======================  =========================  ==========================================
fp8_linear              quantize_fp8               fp8_gemm
fp8_per_token_linear    quantize_fp8_per_token     fp8_gemm
fp8_block_linear        quantize_fp8_per_block     fp8_gemm
nvfp4_linear            quantize_nvfp4             nvfp4_gemm
mxfp8_linear            quantize_mxfp8             mxfp8_gemm
======================  =========================  ==========================================

On a GPU whose matrix units apply no block scales, the activations of the last two are quantized to
codes and decoded to bf16 in one kernel (``quantize_*_to_bf16``), and a weight-only GEMM multiplies:
what the linear operators' own launchers do there.

The parts compute what the whole computes, to the bit: on the CPU by the same functions of
:mod:`mokernels.numerics`, on a GPU by the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, Node

from mokernels.compile.graph import arguments, call, calls, item_of, value
from mokernels.formats import FORMATS, Format
from mokernels.ops.layer_kinds import has_dot
from mokernels.ops.registry import operator
from mokernels.ops.target import target_of

Arguments = Mapping[str, Any]
Splitter = Callable[[Graph, Node, Arguments], "Node | None"]

PAIR_QUANTIZERS = (
    "quantize_fp8_per_token",
    "quantize_fp8_per_block",
    "quantize_nvfp4",
    "quantize_mxfp8",
)
"""Quantizations that return codes and scales."""
SINGLE_QUANTIZERS = ("quantize_fp8", "quantize_nvfp4_to_bf16", "quantize_mxfp8_to_bf16")
"""Quantizations that return one tensor."""
QUANTIZERS = (*PAIR_QUANTIZERS, *SINGLE_QUANTIZERS)


def split_linears(graph: Graph) -> int:
    """Split every linear operator that can be; returns how many were."""
    count = 0
    for node in calls(graph, _SPLITTERS):
        given = arguments(node)
        with graph.inserting_before(node):
            gemm = _SPLITTERS[node.target._opname](graph, node, given)  # type: ignore[union-attr]
        if gemm is not None:
            node.replace_all_uses_with(gemm)
            graph.erase_node(node)
            count += 1
    return count


def _fp8(graph: Graph, node: Node, given: Arguments) -> Node | None:
    if given["input_multiplier"] is None:
        # The operator derives m and 1 / m from the stored scale; layers pass both.
        return None
    scale = given["input_scale"]
    quantize = (given["x"], scale, given["input_multiplier"])
    codes = call(graph, operator("quantize_fp8"), quantize, like=node)
    return _fp8_gemm(graph, node, given, codes, scale)


def _fp8_dynamic(quantizer: str) -> Splitter:
    def split(graph: Graph, node: Node, given: Arguments) -> Node | None:
        pair = call(graph, operator(quantizer), (given["x"],), like=node)
        codes, scale = item_of(graph, pair, 0), item_of(graph, pair, 1)
        return _fp8_gemm(graph, node, given, codes, scale)

    return split


def _fp8_gemm(graph: Graph, node: Node, given: Arguments, codes: Node, scale: Node) -> Node:
    weight = (given["weight"], scale, given["weight_scale"], given["bias"])
    tail = (_dtype_name(given["x"]), False, given["plan_n"])
    return call(graph, operator("fp8_gemm"), (codes, *weight, *tail), like=node)


def _nvfp4(graph: Graph, node: Node, given: Arguments) -> Node | None:
    x, input_scale, bias, plan_n = (given[k] for k in ("x", "input_scale", "bias", "plan_n"))
    weight, scale_2, dtype = given["weight"], given["weight_scale_2"], _dtype_name(x)
    if multiplies(FORMATS["NVFP4"], x):
        pair = call(graph, operator("quantize_nvfp4"), (x, input_scale), like=node)
        codes, scale = item_of(graph, pair, 0), item_of(graph, pair, 1)
        scales = (scale, given["weight_scale"], input_scale, scale_2)
        args = (codes, weight, *scales, bias, dtype, plan_n)
        return call(graph, operator("nvfp4_gemm"), args, like=node)
    values = call(graph, operator("quantize_nvfp4_to_bf16"), (x, input_scale), like=node)
    weights = (weight, given["weight_scale"], scale_2)
    tail = (bias, plan_n, input_scale, dtype)
    return call(graph, operator("nvfp4_weight_only_gemm"), (values, *weights, *tail), like=node)


def _mxfp8(graph: Graph, node: Node, given: Arguments) -> Node | None:
    x, bias, plan_n = given["x"], given["bias"], given["plan_n"]
    weight, scale, dtype = given["weight"], given["weight_scale"], _dtype_name(x)
    if multiplies(FORMATS["MXFP8"], x):
        pair = call(graph, operator("quantize_mxfp8"), (x,), like=node)
        codes, exponents = item_of(graph, pair, 0), item_of(graph, pair, 1)
        args = (codes, weight, exponents, scale, bias, dtype, plan_n)
        return call(graph, operator("mxfp8_gemm"), args, like=node)
    values = call(graph, operator("quantize_mxfp8_to_bf16"), (x,), like=node)
    tail = (bias, plan_n, dtype)
    return call(
        graph, operator("mxfp8_weight_only_gemm"), (values, weight, scale, *tail), like=node
    )


def multiplies(format: Format, x: Any) -> bool:
    """Whether codes of a format of groups go to the GEMM as they are where ``x`` lives."""
    device: torch.device = value(x).device
    return device.type == "cpu" or has_dot(format, target_of(device))


def _dtype_name(x: Any) -> str:
    return str(value(x).dtype).removeprefix("torch.")


_SPLITTERS: Mapping[str, Splitter] = MappingProxyType(
    {
        "fp8_linear": _fp8,
        "fp8_per_token_linear": _fp8_dynamic("quantize_fp8_per_token"),
        "fp8_block_linear": _fp8_dynamic("quantize_fp8_per_block"),
        "nvfp4_linear": _nvfp4,
        "mxfp8_linear": _mxfp8,
    }
)
