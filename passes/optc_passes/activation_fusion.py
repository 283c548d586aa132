"""Fuse an activation into the convolution or linear layer before it."""

from __future__ import annotations

import torch
from torch import fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.ops import ACTIVATIONS
from optc.rewrite import argument, calls, label, used_by
from optc_passes.composites import as_layer, fuse

aten = torch.ops.aten
_WITHOUT_COMPOSITE = (
    aten.celu.default,
    aten.elu.default,
    aten.leaky_relu.default,
    aten.log_sigmoid.default,
    aten.mish.default,
    aten.prelu.default,
    aten.selu.default,
    aten.softplus.default,
    aten.tanh.default,
)
"""Activations that are looked at only to say that they stay on their own."""


class FuseActivation(Pass):
    """Conv2d or linear (also with a residual fused in) and the activation that alone uses it become one composite.

    Exact for finite values: oneDNN's fused relu, relu6 and hardsigmoid give a number where the activation alone gives
    NaN, so a model that overflows may not show it any more.
    """

    name = "fuse-activation"
    summary = "Fuse activations into the convolution or linear layer before them."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        candidates = {activation.target for activation in ACTIVATIONS.values()}
        for node in calls(program, aten.relu6.default, *candidates, *_WITHOUT_COMPOSITE):
            done = _fuse(node)
            if isinstance(done, Change):
                applied.append(done)
            elif done is not None:
                skipped.append(Skip(self.name, node.name, done))
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


def _fuse(node: fx.Node) -> Change | str | None:
    """Fuse one activation, say why not, or ``None`` if what it is applied to is no such layer."""
    layer = as_layer(node.args[0])
    if layer is None or isinstance(layer, str):
        return layer
    activation = _activation(node)
    composite = layer.composite(activation, layer.residual) if activation else None
    if composite is None:
        return f"there is no composite of {layer.kind} and {_describe(node)}"
    if len(layer.node.users) > 1:
        return f"{label(layer.node)} is also used by {used_by(layer.node, node)}"
    detail = f"{label(layer.node)} + {node.name}"
    new = fuse(node, layer, composite, layer.args)
    return Change(FuseActivation.name, new.name, detail)


def _activation(node: fx.Node) -> str | None:
    """The name in ``ACTIVATIONS`` of what a node computes."""
    if node.target is aten.relu6.default:
        return "relu6"
    for name, activation in ACTIVATIONS.items():
        if node.target is activation.target:
            given = [argument(node, parameter.name) for parameter in activation.target._schema.arguments[1:]]
            defaults = [parameter.default_value for parameter in activation.target._schema.arguments[1:]]
            wanted = [*activation.args, *activation.kwargs.values()] or defaults
            if given == wanted:
                return name
    return None


def _describe(node: fx.Node) -> str:
    name = str(node.target._opname)  # type: ignore[union-attr]
    if node.target is aten.hardtanh.default:
        return f"{name}({argument(node, 'min_val')}, {argument(node, 'max_val')})"
    return name
