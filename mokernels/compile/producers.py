"""Fourth rewrite: what comes before a quantization joins it in one kernel of ours.

Recognised are RMSNorm in the three ways in which models round it, with the addition of the residual
before it if there is one, and gated activations. Inductor fuses these by itself for one scale per
tensor or token, in two to three passes over the row; with scales of blocks it takes two kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional

from mokernels.compile.graph import aten, call, calls, item_of, name_of, replace_items, value
from mokernels.compile.split import PAIR_QUANTIZERS, QUANTIZERS
from mokernels.compile.templates import ANY_NUMBER, Match, Parameter, find
from mokernels.ops.checks import FLOAT_DTYPES
from mokernels.ops.registry import operator


@dataclass(frozen=True)
class Fused:
    """One quantization that took its producer in.

    Attributes:
        node: the new operator.
        quantize: the quantization that it replaces (already removed from the graph).
        what: for the report: ``"residual + RMSNorm"``, ``"RMSNorm"``, ``"silu * up"``, ...
    """

    node: Node
    quantize: Node
    what: str


def _cast_then_scale(x: Tensor, weight: Tensor) -> Tensor:
    return weight * _normalised(x).to(x.dtype)


def _scale_then_cast(x: Tensor, weight: Tensor) -> Tensor:
    return (weight * _normalised(x)).to(x.dtype)


def _torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, ANY_NUMBER)


def _one_plus_weight(x: Tensor, weight: Tensor) -> Tensor:
    return (_normalised(x) * (1.0 + weight.float())).to(x.dtype)


def _normalised(x: Tensor) -> Tensor:
    wide = x.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ANY_NUMBER)


def _silu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _gelu(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate) * up


def _gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh") * up


NORMS: Mapping[Callable[..., Tensor], str] = MappingProxyType(
    {
        _cast_then_scale: "cast_then_scale",
        _one_plus_weight: "one_plus_weight",
        _scale_then_cast: "scale_then_cast",
        _torch_rms_norm: "scale_then_cast",
    }
)
"""Templates of RMSNorm and the style that the fused operators call them."""

GATES: Mapping[Callable[..., Tensor], str] = MappingProxyType(
    {_silu: "silu", _gelu: "gelu", _gelu_tanh: "gelu_tanh"}
)
"""Templates of gated activations and the name that the fused operators call them."""


def fuse_norms(graph: Graph) -> list[Fused]:
    """RMSNorm, with the residual addition before it if possible, goes into quantizations."""
    fused = []
    for quantize in calls(graph, QUANTIZERS):
        x = quantize.args[0]
        found = _norm(x) if _is_private_float(x, quantize) else None
        if found is not None and found[0].is_private({quantize}):
            fused.append(_fuse_norm(graph, quantize, *found))
    return fused


def fuse_gates(graph: Graph) -> list[Fused]:
    """SiLU or GELU of one tensor times another goes into quantizations."""
    fused = []
    for quantize in calls(graph, QUANTIZERS):
        x = quantize.args[0]
        found = _gate(x) if _is_private_float(x, quantize) else None
        if found is not None and found[0].is_private({quantize}):
            match, activation = found
            with graph.inserting_before(quantize):
                args = (*match.inputs, activation, *quantize.args[1:])
                node = call(graph, _fused_operator("gated", quantize), args, like=quantize)
                results = _results(graph, node, quantize)
            _finish(quantize, results)
            fused.append(Fused(node, quantize, f"{activation} * up"))
    return fused


def _is_private_float(x: Any, quantize: Node) -> bool:
    return isinstance(x, Node) and set(x.users) == {quantize} and value(x).dtype in FLOAT_DTYPES


def _norm(x: Node) -> tuple[Match, str] | None:
    """RMSNorm that ends in ``x``: inputs [x, weight]."""
    dtype = value(x).dtype
    for template, style in NORMS.items():
        for weight_dtype in dict.fromkeys((dtype, torch.float32)):
            for x_dtype in dict.fromkeys((dtype, *FLOAT_DTYPES)):
                match = find(template, (Parameter(x_dtype), Parameter(weight_dtype, 1)), x)
                if match is not None and _norm_fits(match, x):
                    return match, style
    return None


def _norm_fits(match: Match, x: Node) -> bool:
    source, weight = (value(node) for node in match.inputs)
    return source.shape == value(x).shape and tuple(weight.shape) == (value(x).shape[-1],)


def _gate(x: Node) -> tuple[Match, str] | None:
    """A gated activation that ends in ``x``: inputs [gate, up]."""
    dtype = value(x).dtype
    for template, name in GATES.items():
        match = find(template, (Parameter(dtype), Parameter(dtype)), x)
        if match is not None and all(value(i).shape == value(x).shape for i in match.inputs):
            return match, name
    return None


def _fuse_norm(graph: Graph, quantize: Node, match: Match, style: str) -> Fused:
    x, weight = match.inputs
    tail = (weight, match.number, style, *quantize.args[1:])
    addition = _residual(graph, x, quantize, tail)
    if addition is None:
        with graph.inserting_before(quantize):
            target = _fused_operator("rms_norm", quantize)
            node = call(graph, target, (x, *tail), like=quantize)
            results = _results(graph, node, quantize)
        _finish(quantize, results)
        return Fused(node, quantize, "RMSNorm")
    with graph.inserting_before(addition):
        target = _fused_operator("add_rms_norm", quantize)
        node = call(graph, target, (*addition.args, *tail), like=quantize)
        total, *results = (item_of(graph, node, i) for i in range(len(node.meta["val"])))
    addition.replace_all_uses_with(total)
    _finish(quantize, results)
    return Fused(node, quantize, "residual + RMSNorm")


def _residual(graph: Graph, x: Node, quantize: Node, tail: tuple[Any, ...]) -> Node | None:
    """The addition that makes ``x``, if the fused operator can stand in its place."""
    if x.target is not aten.add.Tensor or len(x.args) != 2 or x.kwargs:
        return None
    one, other = x.args
    if not (isinstance(one, Node) and isinstance(other, Node)):
        return None
    if not value(one).shape == value(other).shape == value(x).shape:
        return None
    if not value(one).dtype == value(other).dtype == value(x).dtype:
        return None
    # The norm's weight and the quantization's scale have to be there when the sum is.
    needed = {node for node in tail if isinstance(node, Node) and node.op != "placeholder"}
    for node in graph.nodes:
        if node is x:
            return x if not needed else None
        needed.discard(node)
    return None


def _fused_operator(producer: str, quantize: Node) -> Callable[..., Any]:
    return operator(f"{producer}_{name_of(quantize)}")


def _results(graph: Graph, node: Node, quantize: Node) -> list[Node]:
    if name_of(quantize) not in PAIR_QUANTIZERS:
        return [node]
    return [item_of(graph, node, index) for index in range(2)]


def _finish(quantize: Node, results: list[Node]) -> None:
    """Let the quantization's users use the fused operator's results."""
    if name_of(quantize) in PAIR_QUANTIZERS:
        replace_items(quantize, results)
    else:
        quantize.replace_all_uses_with(results[0])
        quantize.graph.erase_node(quantize)
