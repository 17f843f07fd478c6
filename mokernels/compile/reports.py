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
    lines = [f"graph {index}: {_calls(len(graph.calls))} of mokernels' operators{others}"]
    layers: dict[tuple[str, int], list[int]] = {}
    for layer, count in graph.calls_per_layer().items():
        name, number = _without_number(layer)
        layers.setdefault((name, count), []).extend(number)
    for (name, count), alike in layers.items():
        each = " each" if len(alike) > 1 else ""
        where = _named(name, alike) or "outside of numbered layers"
        lines.append(f"  {where}: {_calls(count)}{each}")
    return lines + _rewrite_lines(graph.rewrites)


def _rewrite_lines(rewrites: Iterable[Rewrite]) -> list[str]:
    """A line for what was done alike in several layers."""
    alike: dict[tuple[str, str], list[int]] = {}
    for rewrite in rewrites:
        names = [_without_number(path) for path in rewrite.modules]
        where = ", ".join(name for name, _ in names) or "(module not known)"
        why = f" ({rewrite.why})" if rewrite.why else ""
        numbers = alike.setdefault((f"  {rewrite.what} -> {rewrite.operator}", where + why), [])
        numbers.extend(number for _, found in names for number in found)
    return [f"{what}: {_named(where, numbers)}" for (what, where), numbers in alike.items()]


def _without_number(path: str) -> tuple[str, tuple[int, ...]]:
    """The path with a star for the layer's number, and that number if it has one."""
    layer = layer_of(path)
    if not layer:
        return path, ()
    parent, _, number = layer.rpartition(".")
    return f"{parent + '.' if parent else ''}*{path[len(layer) :]}", (int(number),)


def _named(where: str, numbers: list[int]) -> str:
    """Paths of one layer as they are; of several with a star, and which layers these are."""
    if len(set(numbers)) < 2:
        return where.replace("*", str(numbers[0])) if numbers else where
    return f"{where} (* = {_ranges(sorted(set(numbers)))})"


def _ranges(numbers: list[int]) -> str:
    """``0-3, 7`` of 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _calls(count: int) -> str:
    return f"{count} call{'s' * (count != 1)}"
