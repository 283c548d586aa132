"""Composite operators back into plain ATen, for backends that have no kernel for them."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload

from optc.ops.composites import COMPOSITES, Composite
from optc.program import Program, complete_meta
from optc.rewrite import argument, calls


def decompose(program: Program) -> Program:
    """A program that computes the same with every ``optc::`` composite replaced by its ATen operators.

    Nothing is executed; constants are shared with ``program``, which is left as it was. Each node made has the name of
    the composite it was a part of in ``meta["part_of"]``.
    """
    result = program.fork()
    for node in calls(result, *COMPOSITES):
        _inline(node, COMPOSITES[node.target])  # type: ignore[index]
    complete_meta(result)
    result.module.recompile()
    return result


def _inline(node: fx.Node, composite: Composite) -> None:
    graph = node.graph
    origin = {key: value for key, value in node.meta.items() if key != "val"} | {"part_of": node.name}

    def call(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        made.meta = dict(origin)
        return made

    arguments = tuple(argument(node, parameter.name) for parameter in node.target._schema.arguments)  # type: ignore[union-attr]
    with graph.inserting_before(node):
        last = composite.emit(call, arguments)
    last.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(last)
    graph.erase_node(node)
