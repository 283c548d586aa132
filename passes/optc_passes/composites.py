"""What the two fusions into composite operators share: reading the layer a composite is built on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from optc.ops import COMPOSITES, find_composite
from optc.rewrite import argument, arguments, is_call, loosen_layout, replace, shape, strides
from optc_passes.layers import DECOMPOSED

aten = torch.ops.aten
_OTHER_LAYERS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)


@dataclass(frozen=True)
class Layer:
    """A 2-D convolution or linear layer, perhaps with a residual added, that no activation has been fused into.

    Attributes:
        base: ``aten.conv2d.default`` or ``aten.linear.default``.
        args: the arguments of the composite it will become, without ``other`` unless ``residual``.
    """

    node: fx.Node
    base: OpOverload
    args: tuple[Any, ...]
    residual: bool = False

    def composite(self, activation: str | None, residual: bool) -> OpOverload | None:
        """The composite operator of this layer with an activation, a residual or both."""
        return find_composite(self.base, activation, residual)

    @property
    def kind(self) -> str:
        """For messages: ``"conv2d"``, ``"linear"`` or, with a residual, ``"conv2d_add"``."""
        name = self.base._opname
        return f"{name}_add" if self.residual else name


def as_layer(node: object) -> Layer | str | None:
    """The layer at a node; why not, if it is one that no composite is built on; ``None`` if it is anything else."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if is_call(node, aten.convolution.default):
        return f"{node.name} is {DECOMPOSED}"
    if is_call(node, aten.conv2d.default, aten.linear.default):
        if len(shape(argument(node, "weight"))) < 2:
            return f"the weight of {node.name} is a vector"
        return Layer(node, node.target, arguments(node))  # type: ignore[arg-type]
    if is_call(node, aten.conv2d.padding):  # capture writes other paddings than these as numbers
        return f"{node.name} pads one side more than the other"
    row = COMPOSITES.get(node.target)  # type: ignore[call-overload]
    if row is not None and row.activation is None:
        return Layer(node, row.base, arguments(node), residual=True)
    if is_call(node, *_OTHER_LAYERS):
        what = "a transposed" if "transpose" in str(node.target) else "not a 2-D"
        return f"{node.name} is {what} convolution"
    return None


def fuse(end: fx.Node, layer: Layer, composite: OpOverload, args: tuple[Any, ...]) -> fx.Node:
    """Put a composite at the place of ``end`` (so all its operands are there) and erase ``end`` and the layer."""
    with end.graph.inserting_before(end):
        new = end.graph.create_node("call_function", composite, args, name=composite._opname)
    module = layer.node.meta.get("nn_module_stack")
    if module is not None:  # of the two modules it now stands for, the layer says more
        new.meta["nn_module_stack"] = module
    new.meta["val"] = layer.node.meta["val"]  # laid out as the layer's, not as what is added to it
    relaid = strides(end) != strides(new)
    replace(end, new)
    layer.node.graph.erase_node(layer.node)
    if relaid:
        loosen_layout([new])
    return new
