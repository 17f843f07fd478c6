"""Small tools for FX graphs after AOTAutograd: arguments by name, new calls, paths of modules."""

from __future__ import annotations

import operator as python_operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from mokernels.ops.registry import NAMESPACE

aten = torch.ops.aten
_SEE_THROUGH = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def name_of(node: Any) -> str:
    """Name of our operator that ``node`` calls, without the namespace; "" for anything else."""
    target = getattr(node, "target", None)
    if isinstance(target, torch._ops.OpOverload) and target.namespace == NAMESPACE:
        return str(target._opname)
    return ""


def calls(graph: Graph, names: Iterable[str]) -> list[Node]:
    """The nodes that call one of our operators called ``names``, in the order of the graph."""
    wanted = frozenset(names)
    return [node for node in graph.nodes if name_of(node) in wanted]


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of a call of an operator by name, in its schema's order, with its defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    given |= node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def value(node: Any) -> Any:
    """The fake tensor (or number) that a node stands for; anything else is itself."""
    return node.meta["val"] if isinstance(node, Node) else node


def call(
    graph: Graph, target: Callable[..., Any], args: Sequence[Any], *, like: Node | None = None
) -> Node:
    """Add a call of an operator, with what Inductor needs to know about its result.

    Trailing arguments that have their default are left out, so that equal calls look equal.

    Args:
        graph: where; the insertion point is the caller's.
        target: the overload.
        args: its arguments in order, nodes or values.
        like: the node whose place in the user's model (stack trace, modules) the new one has.
    """
    node = graph.call_function(target, _without_defaults(target, args))
    if like is not None:
        node.meta = {key: kept for key, kept in like.meta.items() if key not in _OF_THE_VALUE}
    values = [value(argument) for argument in node.args]
    with fake_mode_of(values):
        node.meta["val"] = target(*values)
    return node


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The fake mode in which a graph's values live."""
    for item in values:
        if isinstance(item, torch._subclasses.FakeTensor):
            return item.fake_mode
    raise ValueError("no argument is a fake tensor")


def item_of(graph: Graph, node: Node, index: int) -> Node:
    """``node[index]`` of an operator with several results."""
    item = graph.call_function(python_operator.getitem, (node, index))
    item.meta = {key: kept for key, kept in node.meta.items() if key not in _OF_THE_VALUE}
    item.meta["val"] = node.meta["val"][index]
    return item


def items(node: Node) -> dict[int, list[Node]]:
    """The users of an operator with several results that take one of them, by its index."""
    found: dict[int, list[Node]] = {}
    for user in node.users:
        if user.target is python_operator.getitem:
            found.setdefault(user.args[1], []).append(user)  # type: ignore[arg-type]
    return found


def replace_items(node: Node, results: Sequence[Node]) -> None:
    """Let every user of ``node[i]`` use ``results[i]``, and remove ``node``."""
    for index, takers in items(node).items():
        for taker in takers:
            taker.replace_all_uses_with(results[index])
            node.graph.erase_node(taker)
    node.graph.erase_node(node)


def source(node: Any) -> Any:
    """What ``node`` is a reshaped view of: the node behind views and reshapes."""
    while isinstance(node, Node) and node.target in _SEE_THROUGH:
        node = node.args[0]
    return node


def module_of(node: Node) -> str:
    """Path of the module that made a node (``model.layers.0.mlp.up_proj``), "" if not known."""
    stack = node.meta.get("nn_module_stack")
    path = next(reversed(stack.values()))[0] if stack else ""
    return clean_path(path)


def clean_path(path: str) -> str:
    """Dynamo's ``L['self']._modules['model'].layers[0]`` as ``model.layers.0``."""
    path = _ROOT.sub("", path)
    for old, new in (("_modules", ""), ("_orig_mod", ""), ("__dict__", ""), ("[", "."), ("]", ".")):
        path = path.replace(old, new)
    return ".".join(filter(None, (part.strip("'\"") for part in path.split("."))))


def _without_defaults(target: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    kept = list(args)
    schema = target._schema.arguments
    while kept:
        argument = schema[len(kept) - 1]
        last = kept[-1]
        if isinstance(last, Node) or not argument.has_default_value():
            break
        if last != argument.default_value:
            break
        kept.pop()
    return tuple(kept)


# The variable of the compiled frame that holds the model: "self", "fn", whatever the user wrote, or
# the first of a decorator's "args".
_ROOT = re.compile(r"^[LG]\[['\"](args['\"]\]\[0|[^'\"]*['\"])\]")
_OF_THE_VALUE = frozenset({"val", "tensor_meta", "eager_input_vals"})
