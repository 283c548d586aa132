"""``channels_last``: 2-D convolutions and what lies between them in the memory format their kernels like best."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.ops import COMPOSITES
from optc.rewrite import (
    STRIDES_READ,
    add_constant,
    argument,
    constant_of,
    erase_unused,
    is_call,
    loosen_layout,
    set_argument,
    strides_read,
)
from optc_passes.fake_values import recompute

aten = torch.ops.aten
CONVOLUTIONS = (
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv_transpose2d.input,
    aten.convolution.default,
    *(target for target, row in COMPOSITES.items() if row.is_conv),
)


class ChannelsLast(Pass):
    """Weights of 2-D convolutions are stored channels-last, and their inputs made so where they are not.

    Values stay channels-last from one convolution to the next, as element-wise operators and pools keep the format;
    in between, copies stand where an operator gives another. Values do not change, nor does the layout of outputs.
    """

    name = "channels_last"
    summary = "Store 2-D convolutions' weights and activations in channels-last memory format."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        outputs = [n for n in program.graph.output_node().all_input_nodes if n.meta["val"].is_contiguous()]
        weights: dict[fx.Node, fx.Node] = {}
        chosen = []
        strided = strides_read(program)
        for node in _convolutions(program):
            if reason := STRIDES_READ if node in strided else _refusal(program, node):
                skipped.append(Skip(self.name, node.name, reason))
                continue
            chosen.append(node)
            if _store_weight(program, node, weights):
                applied.append(Change("weight", node.name))
        if not weights and all(_is_channels_last(argument(node, "input")) for node in chosen):
            return PassResult(program, False, (), tuple(skipped))
        erase_unused(weights)
        copies: dict[fx.Node, fx.Node] = {}
        loosen_layout(chosen)
        moved: set[fx.Node] = set()
        for node in list(program.graph.nodes):
            if node in chosen:
                source = argument(node, "input")
                if not _is_channels_last(source):
                    if source not in copies:
                        copies[source] = _copy(source, torch.channels_last)
                        applied.append(Change("to-channels-last", copies[source].name, node.name))
                    node.replace_input_with(source, copies[source])
            if node.op == "call_function" and (node in chosen or not moved.isdisjoint(node.all_input_nodes)):
                recompute(node)
                moved.add(node)
        for node in outputs:
            if not node.meta["val"].is_contiguous():
                copy = _copy(node, torch.contiguous_format)
                program.graph.output_node().replace_input_with(node, copy)
                applied.append(Change("from-channels-last", copy.name, "an output"))
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


def _convolutions(program: Program) -> Iterator[fx.Node]:
    for node in list(program.graph.nodes):
        if is_call(node, *CONVOLUTIONS) and _rank(argument(node, "weight")) == 4:
            yield node


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _refusal(program: Program, node: fx.Node) -> str | None:
    if constant_of(program, argument(node, "weight")) is None:
        return "its weight is computed, not a constant"
    if _rank(argument(node, "input")) != 4:
        return "its input has no batch dimension"
    return None


def _is_channels_last(node: fx.Node) -> bool:
    value: Tensor = node.meta["val"]
    return value.is_contiguous(memory_format=torch.channels_last)


def _store_weight(program: Program, node: fx.Node, stored: dict[fx.Node, fx.Node]) -> bool:
    """Give a convolution its weight in channels-last strides; ``False`` if it has those.

    Args:
        stored: the new weights by the old ones; convolutions that shared one still do.
    """
    old = argument(node, "weight")
    value = constant_of(program, old)
    assert value is not None, "_refusal checks it"
    if _is_channels_last(old):
        return False
    if old not in stored:
        new = add_constant(program, node, str(old.target), value.detach().contiguous(memory_format=torch.channels_last))
        new.meta["val"] = old.meta["val"].contiguous(memory_format=torch.channels_last)
        stored[old] = new
    set_argument(node, "weight", stored[old])
    return True


def _copy(source: fx.Node, memory_format: torch.memory_format) -> fx.Node:
    """A copy in another memory format right behind ``source``."""
    graph, following = source.graph, source.next
    while following.op == "placeholder":
        following = following.next
    with graph.inserting_before(following):
        new = graph.call_function(aten.contiguous.default, (source,), {"memory_format": memory_format})
    recompute(new)
    if "dims" in source.meta:
        new.meta["dims"] = source.meta["dims"]
    return new
