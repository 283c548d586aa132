"""Weights in oneDNN's own layout, so that no call has to reorder them (PyTorch's convolution does, every time)."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from optc.ops import COMPOSITES, Composite, cpu
from optc.ops.composites import pair
from optc.program import Program
from optc.rewrite import (
    STRIDES_READ,
    add_constant,
    argument,
    arguments,
    calls,
    constant_of,
    erase_unused,
    loosen_layout,
    replace,
    shape,
    strides_read,
)

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn
_PLAIN = {
    base: Composite(base._opname, base, activation=None, residual=False)
    for base in (aten.conv2d.default, aten.linear.default)
}
LAYERS = {**_PLAIN, **COMPOSITES}
"""What can be packed: convolutions and linear layers, plain and composite."""


@dataclass(frozen=True)
class Packed:
    """What :func:`prepack` did: how many ``layers`` it packed, and by the names of others' nodes why they were left."""

    layers: int
    left: dict[str, str]


@torch.no_grad()
def prepack(program: Program) -> Packed:
    """Replace, in place, each convolution and linear layer with constant weights by one oneDNN primitive.

    Weights are laid out for the batch size of the program's example inputs; other batch sizes compute the same.
    Convolutions then work channels-last inside, whatever layout their input has.
    """
    packed, left, convolutions = 0, dict[str, str](), []
    uses = Counter(str(node.target) for node in program.graph.find_nodes(op="get_attr"))
    strided = strides_read(program)
    for node in calls(program, *LAYERS):
        row = LAYERS[node.target]  # type: ignore[index]
        weight = constant_of(program, argument(node, "weight"))
        reason = "its weight is computed" if weight is None else _refusal(node, row, weight)
        if row.is_conv and node in strided:
            reason = STRIDES_READ
        if weight is None or reason:
            left[node.name] = str(reason)
            continue
        old = argument(node, "weight")
        new = _pack(program, node, row, weight)
        if old._erased and uses[str(old.target)] == 1:  # at once, so that no two copies of all weights pile up
            _delete_constant(program, str(old.target))
        packed += 1
        if row.is_conv:
            convolutions.append(new)
    loosen_layout(convolutions)
    program.module.recompile()
    return Packed(packed, left)


def _refusal(node: fx.Node, row: Composite, weight: Tensor) -> str | None:
    if weight.dim() < 2:
        return "its weight is a vector"
    fakes = fx.map_arg(arguments(node), lambda n: n.meta["val"])
    return cpu.refusal(row, fakes, packed=True)


def _pack(program: Program, node: fx.Node, row: Composite, weight: Tensor) -> fx.Node:
    args = arguments(node)
    x, old, *_ = args
    assert isinstance(x, fx.Node)
    assert isinstance(old, fx.Node)
    if row.is_conv:
        stride, padding, dilation, groups = args[-4:]
        layout = (pair(padding), pair(stride), pair(dilation), groups)
        data = mkldnn._reorder_convolution_weight(weight.detach(), *layout, list(shape(x)))
    else:
        data = mkldnn._reorder_linear_weight(weight.detach(), math.prod(shape(x)[:-1]))
    constant = add_constant(program, node, f"{old.target}_packed", data)
    constant.meta["val"] = old.meta["val"]
    new = _call(node, *cpu.fused_call(row, (x, constant, *args[2:])))
    erase_unused((old,))
    return new


def _delete_constant(program: Program, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    delattr(program.module.get_submodule(path), leaf)


def _call(node: fx.Node, target: OpOverload, args: tuple[fx.node.Argument, ...]) -> fx.Node:
    with node.graph.inserting_before(node):
        new = node.graph.create_node("call_function", target, args, name=node.name)
    replace(node, new)
    return new
