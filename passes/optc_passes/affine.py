"""Folding ``scale·x + shift`` per channel into the layer before it, or into all the layers after it."""

from __future__ import annotations

from torch import Tensor, fx

from optc import Program
from optc.rewrite import dtype, label, loosen_layout, module_path, set_argument, strides
from optc_passes.channels import Route, layer_before, layers_after, pad_mode, pad_value
from optc_passes.layers import scale_input, scale_output


def fold_before(
    program: Program, node: fx.Node, value: fx.Node, axis: int, scale: Tensor, shift: Tensor | None
) -> tuple[bool, str]:
    """Let the layer that computes ``value`` compute ``scale·value + shift``, which ``node`` used to.

    Args:
        scale, shift: one value per channel along ``axis`` of ``value``, float64.

    Returns:
        Whether it was done, and into what or why not.
    """
    route = layer_before(program, node, value, axis)
    if isinstance(route, str):
        return False, route
    fills = _pad_fills(route, scale, shift)
    if isinstance(fills, str):
        return False, fills
    if dtype(route.layer.node) != dtype(value):
        return False, f"{label(route.layer.node)} before it has another data type"
    for pad, fill in fills.items():
        set_argument(pad, "value", fill)
    scale_output(program, route.layer, scale, shift)
    return True, f"into {module_path(route.layer.node) or route.layer.node.name}"


def _pad_fills(route: Route, scale: Tensor, shift: Tensor | None) -> dict[fx.Node, float] | str:
    """What each constant pad on the route must pad with afterwards: it has one value for all channels.

    Reflected, replicated and wrapped values are channel values, so those pads commute with the fold as they are.
    """
    fills = {}
    for pad in route.pads:
        if pad_mode(pad) != "constant":
            continue
        value = pad_value(pad)
        wanted = scale * value if shift is None else scale * value + shift
        if bool((wanted != wanted[0]).any()):
            return f"{label(pad)} before it pads all channels with {value:g}, which would have to differ by channel"
        if float(wanted[0]) != value:
            fills[pad] = float(wanted[0])
    return fills


def fold_after(program: Program, value: fx.Node, axis: int, scale: Tensor, shift: Tensor | None) -> tuple[bool, str]:
    """Let every layer that sees ``value`` apply ``scale`` and ``shift`` to its input itself.

    Returns:
        Whether it was done, and into what or why not.
    """
    if shift is not None and not bool(shift.any()):
        shift = None
    layers = layers_after(program, value, axis, shifted=shift is not None)
    if isinstance(layers, str):
        return False, layers
    if shift is not None or not bool((scale == 1).all()):  # else the weights stay shared, not copied
        for layer in layers:
            scale_input(program, layer, scale, shift)
    return True, "into " + ", ".join(module_path(layer.node) or layer.node.name for layer in layers)


def fold_beside(
    program: Program, node: fx.Node, value: fx.Node, output: fx.Node, axis: int, scale: Tensor, shift: Tensor | None
) -> tuple[bool, str]:
    """Fold ``output = scale·value + shift``, computed at ``node``, into the layer before, or else into those after."""
    done, before = fold_before(program, node, value, axis, scale, shift)
    if done:
        return True, before
    done, after = fold_after(program, output, axis, scale, shift)
    return done, after if done else f"{before}, and after it {after}"


def hand_on(value: fx.Node, output: fx.Node) -> None:
    """Let every user of ``output`` use ``value``, which may be laid out otherwise, instead."""
    output.replace_all_uses_with(value)
    if strides(value) != strides(output):
        loosen_layout([value])
