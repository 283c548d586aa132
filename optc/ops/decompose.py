"""Composite operators back into plain ATen, for backends that have no kernel for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from optc.ops.composites import COMPOSITES, Composite
from optc.program import Program, complete_meta
from optc.rewrite import argument, arguments, calls, replace

aten = torch.ops.aten


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


def global_pools_as_means(program: Program) -> None:
    """Write each average over all of an image as a mean, in place, which is how PyTorch computes it.

    Exporters have no operator for adaptive pools; of a channels-last image PyTorch also sets the result's strides, an
    operator that TensorRT has not. The mean has the name of the pool in ``meta["part_of"]``.
    """
    for node in calls(program, aten.adaptive_avg_pool2d.default):
        if list(argument(node, "output_size")) != [1, 1]:
            continue
        with node.graph.inserting_before(node):
            mean = node.graph.call_function(aten.mean.dim, (node.args[0], [-1, -2], True))
        mean.meta["part_of"] = node.meta.get("part_of", node.name)
        replace(node, mean)
    program.module.recompile()


def _inline(node: fx.Node, composite: Composite) -> None:
    graph = node.graph
    origin = {key: value for key, value in node.meta.items() if key != "val"} | {"part_of": node.name}

    def call(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        made.meta = dict(origin)
        return made

    with graph.inserting_before(node):
        last = composite.emit(call, arguments(node))
    last.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(last)
    graph.erase_node(node)
