"""Matching what a user's model computes against templates, on graphs that AOTAutograd has made.

A template is a function of tensors that is written as a model writes it. It is traced with the
decompositions that Inductor uses, for the dtype, rank and device of the place where it is looked
for, and compared node by node, backwards from its result. So a template follows whatever this
version of torch decomposes it to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node

from mokernels.compile.graph import aten

ANY_NUMBER = 1.2345e-9
"""A constant that stands for any number in a template; at most one to a template."""

_COMMUTATIVE = (aten.mul.Tensor, aten.add.Tensor)
_SIZE = 8


@dataclass
class Match:
    """Where a template was found.

    Attributes:
        inputs: nodes that the template's parameters stand for, in their order.
        number: what stands in place of ANY_NUMBER, if the template has one.
        inner: nodes that compute the result, which itself is one of them.
    """

    inputs: list[Node]
    number: float | None
    inner: set[Node]

    def is_private(self, users: set[Node]) -> bool:
        """Whether nothing but ``users`` and the match itself uses what it computes."""
        return all(user in self.inner or user in users for n in self.inner for user in n.users)


@dataclass(frozen=True)
class Parameter:
    """A tensor that a template takes: ``rank`` -1 stands for the rank of the place."""

    dtype: torch.dtype
    rank: int = -1


def find(
    template: Callable[..., torch.Tensor],
    parameters: tuple[Parameter, ...],
    node: Node,
) -> Match | None:
    """Match ``template`` against the computation that ends in ``node``."""
    like = node.meta["val"]
    graph = _traced(template, parameters, like.dim(), like.device)
    if graph is None:
        return None
    placeholders = graph.find_nodes(op="placeholder")
    result = graph.output_node().args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    for state in _matches(result, node, _State()):
        if all(p in state.bound for p in placeholders):
            inputs = [state.bound[p] for p in placeholders]
            if all(_fits(i, p) for i, p in zip(inputs, parameters, strict=True)):
                return Match(inputs, state.number, set(state.inner))
    return None


@dataclass(frozen=True)
class _State:
    """Nodes bound to placeholders, nodes matched, and the number found, so far."""

    bound: dict[Node, Node] = field(default_factory=dict)
    inner: tuple[Node, ...] = ()
    number: float | None = None


@lru_cache(maxsize=256)
def _traced(
    template: Callable[..., torch.Tensor],
    parameters: tuple[Parameter, ...],
    rank: int,
    device: torch.device,
) -> Graph | None:
    """The template's graph, or None where it cannot be traced (a dtype that it does not take)."""
    from torch._inductor.pattern_matcher import fwd_only

    with FakeTensorMode(), torch._guards.tracing(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # templates are tried with dtypes that no model mixes
        tensors = [
            torch.empty(_shape(p.rank if p.rank >= 0 else rank), dtype=p.dtype, device=device)
            for p in parameters
        ]
        traced = fwd_only(template, tensors)
    return traced.graph


def _shape(rank: int) -> tuple[int, ...]:
    # Sizes differ, and the last one is everywhere the same: nothing is broadcast but along K.
    return (*range(2, 1 + rank), _SIZE) if rank else ()


def _fits(node: Node, parameter: Parameter) -> bool:
    found = node.meta.get("val")
    return isinstance(found, torch.Tensor) and found.dtype == parameter.dtype


def _matches(wanted: Any, found: Any, state: _State) -> Iterator[_State]:
    """Every way in which ``found`` can be what the template has as ``wanted``."""
    if not isinstance(wanted, Node):
        yield from _constants(wanted, found, state)
    elif not isinstance(found, Node):
        return
    elif wanted.op == "placeholder":
        if state.bound.get(wanted, found) is found:
            yield _State({**state.bound, wanted: found}, state.inner, state.number)
    elif found.op == "call_function" and found.target is wanted.target:
        if len(found.args) != len(wanted.args) or found.kwargs.keys() != wanted.kwargs.keys():
            return
        state = _State(state.bound, (*state.inner, found), state.number)
        kwargs = [(wanted.kwargs[key], found.kwargs[key]) for key in wanted.kwargs]
        for args in _orders(found):
            yield from _all([*zip(wanted.args, args, strict=True), *kwargs], state)


def _all(pairs: list[tuple[Any, Any]], state: _State) -> Iterator[_State]:
    if not pairs:
        yield state
        return
    for first in _matches(*pairs[0], state):
        yield from _all(pairs[1:], first)


def _orders(node: Node) -> list[tuple[Any, ...]]:
    args = tuple(node.args)
    if node.target in _COMMUTATIVE and len(args) == 2 and isinstance(args[1], Node):
        return [args, args[::-1]]
    return [args]


def _constants(wanted: Any, found: Any, state: _State) -> Iterator[_State]:
    if isinstance(wanted, float) and math.isclose(wanted, ANY_NUMBER, rel_tol=1e-6):
        if isinstance(found, (int, float)) and state.number in (None, found):
            yield _State(state.bound, state.inner, float(found))
    elif isinstance(wanted, (list, tuple)):
        if isinstance(found, (list, tuple)) and len(wanted) == len(found):
            yield from _all(list(zip(wanted, found, strict=True)), state)
    elif not isinstance(found, Node) and type(wanted) is type(found) and wanted == found:
        yield state
