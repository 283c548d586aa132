"""Fuse the addition of a residual into the convolution or linear layer whose output it is added to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.rewrite import STRIDES_READ, argument, calls, dtype, label, shape, strides_read, used_by
from optc_passes.composites import Layer, as_layer, fuse

aten = torch.ops.aten


class FuseResidual(Pass):
    """Conv2d or linear and the add that alone uses it become one composite, at the add's place.

    Of two layers added to each other the one computed later is fused. Run it before ``fuse-activation``, which then
    fuses a following relu into the same composite.
    """

    name = "fuse-residual"
    summary = "Fuse residual additions into the convolution or linear layer before them."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        strided = strides_read(program)
        for node in calls(program, aten.add.Tensor):
            name, fused = node.name, ""
            for layer, other in _layers(node):
                if isinstance(layer, str):
                    skipped.append(Skip(self.name, name, layer))
                elif fused:
                    if layer.residual:  # the residual stream: it was never to be fused a second time
                        continue
                    skipped.append(Skip(self.name, name, f"{label(layer.node)} is the operand added in {fused}"))
                elif node in strided:
                    skipped.append(Skip(self.name, name, STRIDES_READ))
                elif reason := _refusal(node, layer, other):
                    skipped.append(Skip(self.name, name, reason))
                else:
                    detail = f"{label(layer.node)} + {name}"
                    fused = _fuse(node, layer, other).name
                    applied.append(Change(self.name, fused, detail))
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


def _layers(node: fx.Node) -> list[tuple[Layer | str, Any]]:
    """The operands of an add that are layers, each with the other operand; the layer computed later comes first."""
    left, right = node.args[0], argument(node, "other")
    pairs = [(left, right)] if left is right else [(left, right), (right, left)]
    found = [(layer, other) for value, other in pairs if (layer := as_layer(value)) is not None]
    if len(found) == 2:
        first, second = (layer.node if isinstance(layer, Layer) else None for layer, _ in found)
        if first is None or (second is not None and first < second):
            found.reverse()
    return found


def _refusal(node: fx.Node, layer: Layer, other: Any) -> str | None:
    """Why ``other`` cannot be added inside the layer's operator, or ``None`` if it can."""
    if layer.residual:
        return f"{label(layer.node)} already holds an addition"
    if not (isinstance(other, fx.Node) and isinstance(other.meta["val"], Tensor)):
        return "it adds a number, not a tensor"
    if argument(node, "alpha") != 1:
        return f"it scales an operand by {argument(node, 'alpha')}"
    if other is layer.node:
        return f"it adds {label(layer.node)} to itself"
    if len(layer.node.users) > 1:
        return f"{label(layer.node)} is also used by {used_by(layer.node, node)}"
    if shape(other) != shape(layer.node):
        return f"it broadcasts {list(shape(other))} and {list(shape(layer.node))}"
    if dtype(other) != dtype(layer.node):
        return f"it adds {dtype(other)} to {dtype(layer.node)}"
    return None


def _fuse(node: fx.Node, layer: Layer, other: fx.Node) -> fx.Node:
    composite = layer.composite(None, residual=True)
    assert composite is not None, "conv2d and linear both have one"
    return fuse(node, layer, composite, (*layer.args[:3], other, *layer.args[3:]))
