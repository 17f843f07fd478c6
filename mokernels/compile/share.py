"""Second and third rewrite: one quantization for each activation, one GEMM for each group.

Projections that take one activation (q, k and v; gate and up) quantize it once. Where their weights
lie side by side in one buffer they are also one GEMM: the layers pass slices of the buffer while
they are compiled (:mod:`mokernels.layers.siblings`), so that GEMMs on neighbouring slices of one
tensor can be told from the graph alone. Results are slices of the one result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from mokernels.compile.graph import (
    arguments,
    aten,
    call,
    calls,
    item_of,
    items,
    name_of,
    value,
)
from mokernels.compile.reports import modules_of
from mokernels.compile.split import QUANTIZERS
from mokernels.formats import FP8_BLOCK

ROWS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fp8_gemm": ("b", "scale_b", "bias"),
        "nvfp4_gemm": ("b", "scale_b", "global_scale_b", "bias"),
        "mxfp8_gemm": ("b", "scale_b", "bias"),
        "fp8_weight_only_gemm": ("b", "scale_b", "bias"),
        "nvfp4_weight_only_gemm": ("b", "scale_b", "global_scale_b", "bias"),
        "mxfp8_weight_only_gemm": ("b", "scale_b", "bias"),
    }
)
"""Arguments of the GEMMs that have one row (or item, or 128-row block) for each output feature."""


def share_quantizations(graph: Graph) -> list[tuple[Node, int, tuple[str, ...]]]:
    """Let equal quantizations be one.

    Returns:
        Each that stands for several, for how many, and the paths of their layers.
    """
    equal: dict[tuple[Any, ...], list[Node]] = {}
    for node in calls(graph, QUANTIZERS):
        equal.setdefault((node.target, *node.args), []).append(node)
    shared = [nodes for nodes in equal.values() if len(nodes) > 1]
    found = [(nodes[0], len(nodes), modules_of(nodes)) for nodes in shared]
    for kept, *others in shared:
        for node in others:
            _use_instead(node, kept)
            graph.erase_node(node)
    return found


def merge_projections(graph: Graph) -> list[tuple[Node, list[Node]]]:
    """Make one GEMM of those that multiply one activation by neighbouring rows of one buffer.

    Returns:
        The GEMM and the ones that it stands for, for every group; these have been removed.
    """
    by_shared: dict[tuple[Any, ...], list[_Part]] = {}
    for node in calls(graph, ROWS):
        part = _Part.of(node)
        if part is not None:
            by_shared.setdefault((node.target, *part.shared), []).append(part)
    merged = []
    for parts in by_shared.values():
        for run in _runs(sorted(parts, key=lambda part: part.start)):
            merged.append((_merge(graph, run), [part.node for part in run]))
    for _, nodes in merged:
        for node in nodes:
            graph.erase_node(node)
    return merged


@dataclass(frozen=True)
class _Part:
    """A GEMM whose weight is rows [start, stop) of ``bases["b"]``, and so its scales and bias."""

    node: Node
    bases: Mapping[str, Node | None]
    start: int
    stop: int
    shared: tuple[Any, ...]

    @staticmethod
    def of(node: Node) -> _Part | None:
        """The part that a GEMM is, or None if it multiplies by a whole tensor."""
        given, rows = arguments(node), ROWS[name_of(node)]
        weight = _slice(given["b"])
        if weight is None:
            return None
        bases: dict[str, Node | None] = {"b": weight.base}
        for name in rows[1:]:
            found = _slice(given[name])
            if given[name] is None:
                bases[name] = None
            elif found is not None and _same_rows(given[name], found, weight):
                bases[name] = found.base
            else:
                return None
        shared = (v for name, v in given.items() if name not in rows)
        return _Part(node, bases, weight.start, weight.stop, (*shared, *bases.values()))


class _Slice(NamedTuple):
    base: Node
    start: int
    stop: int


def _same_rows(node: Any, found: _Slice, weight: _Slice) -> bool:
    """Whether a slice of scales or of a bias belongs to the weight's rows."""
    start, stop = weight.start, weight.stop
    if _has_square_blocks(node):
        if start % FP8_BLOCK:
            return False
        start, stop = start // FP8_BLOCK, -(-stop // FP8_BLOCK)
    return (found.start, found.stop) == (start, stop)


def _has_square_blocks(node: Any) -> bool:
    """fp32 scales of rank 2 belong to 128x128 blocks; all others have one row for a feature."""
    tensor = value(node)
    return bool(tensor.dim() == 2 and tensor.dtype == torch.float32)


def _slice(node: Any) -> _Slice | None:
    """Rows of a base tensor; None for anything else."""
    if not isinstance(node, Node) or node.target is not aten.slice.Tensor:
        return None
    given = arguments(node)
    base, start, stop = given["self"], given["start"] or 0, given["end"]
    rows = value(base).shape[0]
    stop = rows if stop is None else stop
    if not all(isinstance(number, int) and number >= 0 for number in (rows, start, stop)):
        return None
    return _Slice(base, start, min(stop, rows)) if (given["dim"], given["step"]) == (0, 1) else None


def _runs(parts: Sequence[_Part]) -> list[list[_Part]]:
    """Parts that continue each other, two or more."""
    runs: list[list[_Part]] = []
    for part in parts:
        if runs and runs[-1][-1].stop == part.start:
            runs[-1].append(part)
        elif not runs or runs[-1][-1].start != part.start:
            runs.append([part])
    return [run for run in runs if len(run) > 1]


def _merge(graph: Graph, run: Sequence[_Part]) -> Node:
    """One GEMM over the rows of all parts, before the first of them; their users take slices."""
    nodes = {part.node for part in run}
    first = next(node for node in graph.nodes if node in nodes)
    start, stop = run[0].start, run[-1].stop
    given = arguments(run[0].node)
    with graph.inserting_before(first):
        for name, base in run[0].bases.items():
            given[name] = None if base is None else _rows(graph, base, start, stop)
        gemm = call(graph, first.target, tuple(given.values()), like=first)  # type: ignore[arg-type]
        for part in run:
            columns = (gemm, -1, part.start - start, part.stop - start)
            result = call(graph, aten.slice.Tensor, columns, like=part.node)
            part.node.replace_all_uses_with(result)
    return gemm


def _rows(graph: Graph, base: Node, start: int, stop: int) -> Node:
    """Rows of a base that belong to output features [start, stop)."""
    if _has_square_blocks(base):
        start, stop = start // FP8_BLOCK, -(-stop // FP8_BLOCK)
    if start == 0 and stop == value(base).shape[0]:
        return base
    return call(graph, aten.slice.Tensor, (base, 0, start, stop))


def _use_instead(node: Node, kept: Node) -> None:
    """Let the users of ``node`` use the equal node ``kept``, which stands before it."""
    if not items(node):
        node.replace_all_uses_with(kept)
        return
    # New items right behind the kept node: its own may stand behind the users of the other.
    for index in sorted({*items(node), *items(kept)}):
        takers = [*items(node).get(index, ()), *items(kept).get(index, ())]
        with kept.graph.inserting_after(kept):
            item = item_of(kept.graph, kept, index)
        for taker in takers:
            taker.replace_all_uses_with(item)
            kept.graph.erase_node(taker)
