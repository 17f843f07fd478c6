"""The pass: everything that mokernels does to a graph, in one place that Inductor can cache."""

from __future__ import annotations

from dataclasses import astuple, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._inductor import metrics
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

import mokernels.formats
import mokernels.invariance
import mokernels.numerics
import mokernels.ops
from mokernels.compile.graph import calls, name_of, value
from mokernels.compile.options import FusionOptions
from mokernels.compile.producers import fuse_gates, fuse_norms
from mokernels.compile.remaining import (
    expand_quantizations,
    is_inductors,
    quantize_in_gemm,
)
from mokernels.compile.reports import GraphReport, Rewrite, graph_report, modules_of
from mokernels.compile.share import ROWS, merge_projections, share_quantizations
from mokernels.compile.split import QUANTIZERS, split_linears
from mokernels.invariance import is_batch_invariant

_LINEARS = (
    "fp8_linear",
    "fp8_per_token_linear",
    "fp8_block_linear",
    "nvfp4_linear",
    "mxfp8_linear",
)


PASSES: list[FusionPass] = []
"""Every pass of this process; :func:`mokernels.compile.report` reads what they did."""


class FusionPass(CustomGraphPass):
    """Rewrites linear operators of mokernels in a post-grad graph; see the modules beside this.

    Nothing else is registered with Inductor (no lowering, no decomposition), so that the pass'
    ``uuid`` is all that Inductor's caches need to know.

    Attributes:
        options: which rewrites may be done.
        reports: one for each graph that the pass has seen with operators of ours.
    """

    def __init__(self, options: FusionOptions | None = None) -> None:
        self.options = options or FusionOptions()
        self.reports: list[GraphReport] = []
        self._kernels_before: int | None = None

    def __call__(self, graph: Graph) -> None:
        """Rewrite ``graph`` in place."""
        count_kernels()
        self.count_kernels()
        if not calls(graph, (*_LINEARS, *QUANTIZERS, *ROWS)):
            return
        rewrites = self._rewrite(graph)
        graph.eliminate_dead_code()
        graph.lint()
        self.reports.append(graph_report(graph, rewrites))
        self._kernels_before = metrics.generated_kernel_count

    def count_kernels(self) -> None:
        """Add to the last report how many kernels Inductor has written since; it is done by now."""
        if self._kernels_before is None or not self.reports:
            return
        # Somebody may have reset Inductor's counter: then it is not known.
        written = metrics.generated_kernel_count - self._kernels_before
        self.reports[-1] = replace(
            self.reports[-1], inductor_kernels=written if written >= 0 else None
        )
        self._kernels_before = None

    def uuid(self) -> Any:
        """Changes with every source that the pass' result depends on, the options and the mode."""
        return _uuid(self.options, is_batch_invariant())

    def _rewrite(self, graph: Graph) -> list[Rewrite]:
        options, rewrites, on_cpu = self.options, [], _on_cpu(graph)
        split_linears(graph)
        if options.share_quantization:
            for node, count, modules in share_quantizations(graph):
                rewrites.append(Rewrite(f"one quantization for {count}", name_of(node), modules))
        if options.merge_projections and not on_cpu:
            for gemm, parts in merge_projections(graph):
                rewrites.append(_rewrite(f"one GEMM for {len(parts)}", name_of(gemm), *parts))
        fusers = [(options.fuse_norm, fuse_norms), (options.fuse_activation, fuse_gates)]
        for wanted, fuse in fusers:
            if wanted and not on_cpu:
                for fused in fuse(graph):
                    what = f"{fused.what} + quantize"
                    rewrites.append(_rewrite(what, name_of(fused.node), fused.node))
        if options.expand:
            for node in expand_quantizations(graph):
                rewrites.append(_rewrite("quantize left to Inductor", "Inductor", node))
        if options.quantize_in_gemm:
            for node in quantize_in_gemm(graph):
                rewrites.append(_rewrite("quantize in the GEMM", name_of(node), node))
        rewrites += [_left(node, on_cpu) for node in calls(graph, QUANTIZERS)]
        return rewrites


def _rewrite(what: str, operator: str, *nodes: Node) -> Rewrite:
    return Rewrite(what, operator, modules_of(nodes))


def _left(node: Node, on_cpu: bool) -> Rewrite:
    if on_cpu:
        why = "on a CPU there is no launch to save"
    elif is_inductors(node.args[0]):
        why = "Inductor would not fuse scales of blocks with what comes before"
    else:
        why = "several GEMMs share it, and nothing that comes before can be fused"
    return Rewrite("quantize by itself", name_of(node), modules_of([node]), why)


def _on_cpu(graph: Graph) -> bool:
    """Whether the operators run their reference: then Inductor's own code is faster than ours."""
    found = calls(graph, (*_LINEARS, *QUANTIZERS, *ROWS))
    return all(_device(node) == "cpu" for node in found)


def _device(node: Node) -> str:
    first = value(node.args[0])
    return first.device.type if isinstance(first, torch.Tensor) else "cpu"


def count_kernels() -> None:
    """Complete the reports of all passes; Inductor compiles one graph after the other."""
    for made in PASSES:
        made.count_kernels()


@cache
def pass_for(options: FusionOptions) -> FusionPass:
    """The one pass with these options: its reports outlast the compilations that made them."""
    made = FusionPass(options)
    PASSES.append(made)
    return made


@cache
def _uuid(options: FusionOptions, invariant: bool) -> Any:
    # Torch remembers one hash alone, and every pass of a chain may ask for its own at every graph.
    return get_hash_for_files(_sources(), extra=repr((*astuple(options), invariant)))


@cache
def _sources() -> tuple[str, ...]:
    """Files of the pass, of the operators (their schemas and references), numerics and formats."""
    packages = (Path(__file__), Path(mokernels.ops.__file__), Path(mokernels.numerics.__file__))
    found = [file for package in packages for file in package.parent.rglob("*.py")]
    modules = (mokernels.formats.__file__, mokernels.invariance.__file__)
    return tuple(sorted(map(str, [*found, *modules])))
