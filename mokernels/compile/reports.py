"""What the compile pass did, graph by graph, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from mokernels.compile.graph import module_of, name_of


@dataclass(frozen=True)
class Rewrite:
    """One rewrite that fired, or a quantization that was left as it is.

    Attributes:
        what: ``"residual + RMSNorm + quantize"``, ``"one GEMM for 3"``, ...
        operator: the operator that runs now.
        modules: paths of the layers concerned, in the user's model.
        why: for what was left.
    """

    what: str
    operator: str
    modules: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    Attributes:
        rewrites: in the order in which they were done.
        calls: operators of ours that the finished graph calls, in order, with the module's path;
            on a GPU one launch each, two where one quantizes many rows before a GEMM or splits K.
        inductor_kernels: launches of kernels that Inductor wrote beside them; None until the next
            graph is compiled or :func:`mokernels.compile.report` is called. Calls of libraries
            (attention, unquantized GEMMs) are not among them.
    """

    rewrites: tuple[Rewrite, ...]
    calls: tuple[tuple[str, str], ...]
    inductor_kernels: int | None = None

    @property
    def modules(self) -> frozenset[str]:
        """Paths of all layers of ours in the graph."""
        paths = {path for _, path in self.calls}
        return frozenset(paths.union(*(rewrite.modules for rewrite in self.rewrites)))

    def calls_per_layer(self) -> dict[str, int]:
        """How many operators of ours each decoder layer calls; "" collects the rest."""
        return dict(Counter(layer_of(path) for _, path in self.calls))


@dataclass(frozen=True)
class CompileReport:
    """What the pass did to a model; ``str()`` gives a readable text.

    Attributes:
        graphs: one for each graph that was compiled in this process; those taken from a cache on
            disk are not among them, since the pass did not run.
    """

    graphs: tuple[GraphReport, ...] = field(default_factory=tuple)

    def count(self, what: str) -> int:
        """How often a rewrite fired, over all graphs, by the beginning of its name."""
        return sum(r.what.startswith(what) for graph in self.graphs for r in graph.rewrites)

    def __str__(self) -> str:
        if not self.graphs:
            return (
                "No graph with operators of mokernels has been compiled in this process: call the "
                "compiled model once. Graphs from Inductor's cache on disk are not seen; set "
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES=1 to compile them anew."
            )
        return "\n".join(
            line for index, graph in enumerate(self.graphs) for line in _lines(index, graph)
        )


def graph_report(graph: Graph, rewrites: Iterable[Rewrite]) -> GraphReport:
    """The report of a graph that the pass has finished."""
    called = [(name_of(node), module_of(node)) for node in graph.nodes if name_of(node)]
    return GraphReport(tuple(rewrites), tuple(called))


def modules_of(nodes: Iterable[Node]) -> tuple[str, ...]:
    """Paths of the modules that made some nodes, without repetition."""
    return tuple(dict.fromkeys(path for node in nodes if (path := module_of(node))))


def layer_of(path: str) -> str:
    """``model.layers.3`` of ``model.layers.3.mlp.up_proj``; "" without a number in it."""
    parts = path.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def _lines(index: int, graph: GraphReport) -> list[str]:
    written = graph.inductor_kernels
    others = "" if written is None else f", {written} kernels by Inductor"
    lines = [f"graph {index}: {len(graph.calls)} calls of mokernels' operators{others}"]
    for layer, count in graph.calls_per_layer().items():
        lines.append(f"  {layer or 'outside of numbered layers'}: {count} calls")
    for rewrite in graph.rewrites:
        where = ", ".join(rewrite.modules) or "(module not known)"
        why = f" ({rewrite.why})" if rewrite.why else ""
        lines.append(f"  {rewrite.what} -> {rewrite.operator}: {where}{why}")
    return lines
