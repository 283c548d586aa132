"""Following one axis (the channels) through operators that only move, drop or average values of the other axes.

Scaling and shifting per channel gives the same result before such an operator as after it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from optc import Program
from optc.rewrite import argument, dims, is_call, label, used_by
from optc_passes.layers import Layer, as_layer, as_reader

aten = torch.ops.aten
_SAME_AXES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
_ROW_MAJOR = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)


def axis_after(node: fx.Node, axis: int) -> int | None:
    """Where ``node`` puts dimension ``axis`` of its first input; ``None`` if it does not preserve channels there."""
    source = node.args[0] if node.args else None
    rank = _rank(source) if isinstance(source, fx.Node) else 0
    if axis >= rank:
        return None
    if is_call(node, *_SAME_AXES):
        return axis
    if is_call(node, aten.dropout.default):
        return None if argument(node, "train") else axis
    if is_call(node, *_ROW_MAJOR):
        return _axis_after_reshape(node, axis)
    if is_call(node, aten.permute.default):
        return [d % rank for d in argument(node, "dims")].index(axis)
    if is_call(node, aten.transpose.int):
        pair = argument(node, "dim0") % rank, argument(node, "dim1") % rank
        return pair[1 - pair.index(axis)] if axis in pair else axis
    if is_call(node, *_PADS):
        padded = argument(node, "pad")
        return axis if not any(padded[2 * (rank - 1 - axis) : 2 * (rank - axis)]) else None
    if is_call(node, aten.slice.Tensor):
        return axis if argument(node, "dim") % rank != axis else None
    if is_call(node, aten.select.int):
        dropped = argument(node, "dim") % rank
        return None if dropped == axis else axis - (dropped < axis)
    if is_call(node, aten.roll.default):
        return axis if axis not in {d % rank for d in argument(node, "dims")} and argument(node, "dims") else None
    if is_call(node, aten.mean.dim) and argument(node, "dtype") is None:
        reduced = {d % rank for d in argument(node, "dim") or range(rank)}
        if axis in reduced:
            return None
        return axis if argument(node, "keepdim") else axis - sum(d < axis for d in reduced)
    return None


def _axis_after_reshape(node: fx.Node, axis: int) -> int | None:
    """The channels stay one axis where as many values follow each channel as before; sizes compared must not vary."""
    before, after = dims(node.args[0]), dims(node)  # type: ignore[arg-type]
    if before is None or after is None or before[axis] == 1:
        return None
    inner = before[axis:]
    if any(isinstance(size, str) for size in inner):
        return None
    following = math.prod(int(size) for size in inner[1:])
    product = 1
    for position in range(len(after) - 1, -1, -1):
        size = after[position]
        if isinstance(size, str) or product > following:
            return None
        if product == following and size == inner[0]:
            return position
        product *= size
    return None


@dataclass(frozen=True)
class Route:
    """A layer, and the pads that stand between it and where the walk began."""

    layer: Layer
    pads: tuple[fx.Node, ...]


def layer_before(program: Program, user: fx.Node, value: fx.Node, axis: int) -> Route | str:
    """The layer whose output channels are dimension ``axis`` of ``value``, reached through what nothing else sees.

    Args:
        user: the node for which ``value`` is looked at.

    Returns:
        The route, or the reason why there is none.
    """
    pads: list[fx.Node] = []
    while True:
        if len(value.users) > 1:
            return f"{label(value)} before it is also used by {used_by(value, besides=user)}"
        layer = as_layer(value)
        if layer is not None:
            if layer.output_axis != axis:
                return f"dimension {axis} is not the channels of {label(value)} before it"
            return layer.not_constant(program) or Route(layer, tuple(pads))
        source = value.args[0] if value.args and isinstance(value.args[0], fx.Node) else None
        source_axis = next((a for a in range(_rank(source)) if axis_after(value, a) == axis), None)
        if source is None or source_axis is None:
            return f"{label(value)} before it is neither a convolution nor a linear layer"
        if is_call(value, *_PADS):
            pads.append(value)
        user, value, axis = value, source, source_axis


def layers_after(program: Program, value: fx.Node, axis: int, shifted: bool) -> list[Layer] | str:
    """The layers that between them are all that sees ``value``, with its dimension ``axis`` as their input channels.

    Args:
        shifted: whether something will be added per channel, which zero padding does not survive.

    Returns:
        The layers, or the reason why something else sees the value.
    """
    found: list[Layer] = []
    pending = [(value, axis)]
    while pending:
        value, axis = pending.pop()
        for user in value.users:
            layer = as_reader(user)
            if layer is not None and layer.input is value:
                reason = layer.not_constant(program)
                if [*user.args, *user.kwargs.values()].count(value) > 1:
                    reason = f"{label(user)} after it adds it as well"
                elif layer.input_axis != axis:
                    reason = f"dimension {axis} is not the channels {label(user)} after it works on"
                elif shifted and layer.pads:
                    reason = f"{label(user)} after it pads with zeros"
                if reason:
                    return reason
                found.append(layer)
                continue
            next_axis = axis_after(user, axis)
            if next_axis is None:
                what = "the output" if user.op == "output" else label(user)
                return f"{what} is neither a convolution nor a linear layer"
            if _puts_in(user, shifted):
                return f"{label(user)} after it pads with a constant"
            pending.append((user, next_axis))
    return found or "there is nothing"


def _puts_in(node: fx.Node, shifted: bool) -> bool:
    """Whether a node adds values that are not its input's; to a scale alone, zeros are like all others."""
    if not is_call(node, *_PADS) or not any(argument(node, "pad")) or pad_mode(node) != "constant":
        return False
    return shifted or pad_value(node) != 0


def _rank(value: fx.Node | None) -> int:
    known = None if value is None else value.meta.get("val")
    return known.dim() if isinstance(known, torch.Tensor) else 0


def pad_mode(node: fx.Node) -> str:
    """``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``."""
    return "constant" if is_call(node, aten.constant_pad_nd.default) else str(argument(node, "mode"))


def pad_value(node: fx.Node) -> float:
    """What a constant pad pads with."""
    return float(argument(node, "value") or 0.0)
