"""Last rewrite: quantizations that nothing of ours took in.

Behind code that Inductor writes they become plain torch operations, which Inductor fuses with that
code, to the bits of our own kernels: where the device's casts to E4M3 round once, and with
reciprocals in fp64, since Triton's own in fp32 are approximate. Behind anything else (attention,
another operator, an input of the graph) they go back into the linear operator if one GEMM takes
them: its launcher can quantize in the GEMM's own launch.
"""

from __future__ import annotations

import operator as python_operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.func import functionalize
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mokernels.compile.graph import (
    arguments,
    aten,
    call,
    calls,
    fake_mode_of,
    items,
    name_of,
    replace_items,
    value,
)
from mokernels.compile.split import PAIR_QUANTIZERS, QUANTIZERS
from mokernels.formats import FP8_BLOCK
from mokernels.ops.registry import operator, reference_of
from mokernels.ops.target import target_of

EXPANDED_ON_GPU = ("quantize_fp8", "quantize_fp8_per_token")
"""What Inductor writes as one kernel with what comes before; blocks take it two."""
EXPANDED_ON_CPU = (*EXPANDED_ON_GPU, "quantize_fp8_per_block")

_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    python_operator.getitem,
)
_CONVERT = torch.ops.prims.convert_element_type.default
_COPIES = (aten.clone.default, aten.cat.default)


def expand_quantizations(graph: Graph) -> list[Node]:
    """Write quantizations behind Inductor's code as plain torch; returns those it replaced."""
    expanded, traces = [], Traces()
    for node in calls(graph, QUANTIZERS):
        x = node.args[0]
        if name_of(node) in _expandable(value(x)) and is_inductors(x):
            inline(graph, node, traces)
            expanded.append(node)
    return expanded


def _expandable(x: torch.Tensor) -> tuple[str, ...]:
    """Quantizations of x that Inductor's code for its device computes to the bit, in one kernel."""
    if x.device.type != "cpu":
        return EXPANDED_ON_GPU if target_of(x.device).casts_fp8_once else ()
    # Inductor's C++ (of torch 2.13) splits a loop over K into whole blocks and forgets the rest:
    # the codes of a short last block would never be written.
    k = x.shape[-1]
    whole = isinstance(k, int) and k % FP8_BLOCK == 0
    return EXPANDED_ON_CPU if whole else EXPANDED_ON_GPU


def quantize_in_gemm(graph: Graph) -> list[Node]:
    """Give quantizations that one GEMM takes back to a linear operator; returns these."""
    made = []
    for node in calls(graph, QUANTIZERS):
        gemm = _only_gemm(node)
        rebuild = None if gemm is None else _LINEARS.get((name_of(node), name_of(gemm)))
        if gemm is None or rebuild is None or is_inductors(node.args[0]):
            continue
        name, args = rebuild(arguments(node), arguments(gemm))
        if args is None:
            continue
        with graph.inserting_before(gemm):
            linear = call(graph, operator(name), args, like=gemm)
        gemm.replace_all_uses_with(linear)
        graph.erase_node(gemm)
        for taker in list(node.users):
            graph.erase_node(taker)
        graph.erase_node(node)
        made.append(linear)
    return made


def is_inductors(node: Any) -> bool:
    """Whether Inductor writes the code that computes ``node``, so that more can join it."""
    while isinstance(node, Node) and node.target in _VIEWS:
        node = node.args[0]
    target = getattr(node, "target", None)
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target.namespace == "prims":
        return True
    return target.namespace == "aten" and (torch.Tag.pointwise in target.tags or target in _COPIES)


class Traces:
    """The references of operators as graphs: one for all calls with operands of the same kind.

    The layers of a model repeat their shapes, and tracing a reference takes ten times as long as
    copying its graph. The graphs belong to the fake tensors of one graph and serve no other.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Graph] = {}

    def of(self, node: Node) -> Graph:
        """The reference of a call, its placeholders being the call's tensors, in their order."""
        values = [value(argument) for argument in node.args]
        key = (name_of(node), *map(_kind, values))
        if key not in self._known:
            self._known[key] = _traced(name_of(node), values)
        return self._known[key]


def _kind(operand: Any) -> Any:
    """What a trace depends on: all of an operand but a tensor's items."""
    if isinstance(operand, torch.Tensor):
        sizes = (str(size) for size in (*operand.shape, *operand.stride()))
        return (operand.dtype, operand.device, *sizes)
    return str(operand)


def _traced(name: str, values: list[Any]) -> Graph:
    from torch._inductor.pattern_matcher import fwd_only

    reference = reference_of(name)
    tensors = [index for index, v in enumerate(values) if isinstance(v, torch.Tensor)]

    def computed(*filled: torch.Tensor) -> Any:
        full = list(values)
        for index, tensor in zip(tensors, filled, strict=True):
            full[index] = tensor
        return reference(*full)

    with fake_mode_of(values):
        # References write in place, which graphs at this stage do not.
        traced = fwd_only(functionalize(computed), [values[index] for index in tensors])
        if values[0].device.type != "cpu":
            _round_reciprocals_once(traced.graph)
    graph: Graph = traced.graph
    return graph


def inline(graph: Graph, node: Node, traces: Traces) -> None:
    """Replace a call of one of our operators by the torch operations of its reference."""
    trace = traces.of(node)
    given = [a for a in node.args if isinstance(value(a), torch.Tensor)]
    placeholders = trace.find_nodes(op="placeholder")
    copies: dict[Node, Any] = dict(zip(placeholders, given, strict=True))
    with graph.inserting_before(node):
        result = graph.graph_copy(trace, copies)
    made = [copies[each] for each in trace.nodes if each.op == "call_function"]
    with fake_mode_of(map(value, given)):
        _evaluate(made)
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    if name_of(node) in PAIR_QUANTIZERS:
        replace_items(node, results)
    else:
        node.replace_all_uses_with(results[0])
        graph.erase_node(node)


def _evaluate(nodes: list[Node]) -> None:
    """Give copied nodes fake tensors of their own: whose storage is whose tells what may alias."""
    for node in nodes:
        args, kwargs = map_arg((node.args, node.kwargs), value)
        node.meta = {**node.meta, "val": node.target(*args, **kwargs)}  # type: ignore[operator]


def _round_reciprocals_once(graph: Graph) -> None:
    """Compute fp32 reciprocals in fp64, which rounds to the same as IEEE division in fp32.

    Double rounding is innocent here: 53 bits are more than twice 24 and two.
    """
    for node in graph.find_nodes(op="call_function", target=aten.reciprocal.default):
        with graph.inserting_before(node):
            wide = call(graph, _CONVERT, (node.args[0], torch.float64), like=node)
            inverse = call(graph, aten.reciprocal.default, (wide,), like=node)
            result = call(graph, _CONVERT, (inverse, torch.float32), like=node)
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _only_gemm(node: Node) -> Node | None:
    """The GEMM that alone takes a quantization's results."""
    takers: list[Node] = list(node.users)
    if name_of(node) in PAIR_QUANTIZERS:
        if set(takers) != {taker for group in items(node).values() for taker in group}:
            return None
        takers = [user for taker in takers for user in taker.users]
    return takers[0] if takers and len(set(takers)) == 1 else None


Rebuilt = tuple[str, tuple[Any, ...] | None]
Rebuild = Callable[[Mapping[str, Any], Mapping[str, Any]], Rebuilt]


def _fp8_linear(quantize: Mapping[str, Any], gemm: Mapping[str, Any]) -> Rebuilt:
    x, scale, multiplier = quantize["x"], quantize["scale"], quantize["multiplier"]
    if scale is not gemm["scale_a"] or not _plain(x, gemm):
        return "fp8_linear", None
    weight = (gemm["b"], gemm["scale_b"], scale, gemm["bias"])
    return "fp8_linear", (x, *weight, multiplier, gemm["plan_n"])


def _dynamic(name: str) -> Rebuild:
    """Quantizations that take nothing but x."""

    def rebuild(quantize: Mapping[str, Any], gemm: Mapping[str, Any]) -> Rebuilt:
        args = (quantize["x"], gemm["b"], gemm["scale_b"], gemm["bias"], gemm["plan_n"])
        return name, args if _plain(args[0], gemm) else None

    return rebuild


def _nvfp4_linear(quantize: Mapping[str, Any], gemm: Mapping[str, Any]) -> Rebuilt:
    x, scale = quantize["x"], quantize["global_scale"]
    if scale is not gemm["global_scale_a"] or not _plain(x, gemm):
        return "nvfp4_linear", None
    weight = (gemm["b"], gemm["scale_b"], gemm["global_scale_b"], scale)
    return "nvfp4_linear", (x, *weight, gemm["bias"], gemm["plan_n"])


def _plain(x: Any, gemm: Mapping[str, Any]) -> bool:
    """Whether the linear operator, which returns x's dtype, does what the GEMM does."""
    dtype = str(value(x).dtype).removeprefix("torch.")
    return gemm["out_dtype"] == dtype and not gemm.get("fast_accum", False)


_LINEARS: Mapping[tuple[str, str], Rebuild] = MappingProxyType(
    {
        ("quantize_fp8", "fp8_gemm"): _fp8_linear,
        ("quantize_fp8_per_token", "fp8_gemm"): _dynamic("fp8_per_token_linear"),
        ("quantize_fp8_per_block", "fp8_gemm"): _dynamic("fp8_block_linear"),
        ("quantize_nvfp4", "nvfp4_gemm"): _nvfp4_linear,
        ("quantize_nvfp4_to_bf16", "nvfp4_weight_only_gemm"): _nvfp4_linear,
        ("quantize_mxfp8", "mxfp8_gemm"): _dynamic("mxfp8_linear"),
        ("quantize_mxfp8_to_bf16", "mxfp8_weight_only_gemm"): _dynamic("mxfp8_linear"),
    }
)
"""(quantization, GEMM) and the linear operator that does both."""
