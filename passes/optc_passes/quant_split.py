"""Composite operators that no int8 kernel covers, split into what one does and the rest."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload

from optc import Program
from optc.ops import COMPOSITES
from optc.rewrite import arguments, calls

_KEPT_ACTIVATIONS = (None, "relu", "relu6")


def split_composites(program: Program) -> Program:
    """Split, in place, each convolution with a residual or with an activation that int8 kernels do not apply.

    An int8 convolution writes int8. What follows it (a residual in int8, a GELU in float) needs the rounded value, so
    the rounding must have its place in the graph between the two. Linear layers may write float and stay whole.
    """
    for node in calls(program, *COMPOSITES):
        row = COMPOSITES[node.target]  # type: ignore[index]
        if row.is_conv and (row.residual or row.activation not in _KEPT_ACTIVATIONS):
            split_composite(node)
    return program


def split_composite(node: fx.Node) -> None:
    """Replace a composite by the plain operators that it stands for."""
    row = COMPOSITES[node.target]  # type: ignore[index]

    def call(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        made = node.graph.call_function(target, args, kwargs)
        made.meta = dict(node.meta)  # every step has the composite's shape and data type
        return made

    with node.graph.inserting_before(node):
        last = row.emit(call, arguments(node))
    node.replace_all_uses_with(last)
    node.graph.erase_node(node)
