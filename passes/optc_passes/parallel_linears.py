"""Compute linear layers that read one input (query, key and value) with one matrix product."""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import Tensor, fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.ops import COMPOSITES
from optc.rewrite import (
    STRIDES_READ,
    add_constant,
    argument,
    calls,
    constant_of,
    dims,
    erase_unused,
    label,
    loosen_layout,
    replace,
    returned,
    shape,
    strides_read,
    used_by,
)
from optc_passes.layers import as_layer

aten = torch.ops.aten
_WITH_MORE_FUSED = tuple(target for target, row in COMPOSITES.items() if row.base is aten.linear.default)


class MergeParallelLinears(Pass):
    """Concatenate the weights of linear layers over one input, and split the result.

    A layer without bias gets zeros where another has one. Weights that other operators use too are not copied.
    """

    name = "merge-parallel-linears"
    summary = "Compute linear layers over one input with one matrix product."

    def run(self, program: Program, context: PassContext) -> PassResult:
        by_input: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in calls(program, aten.linear.default, *_WITH_MORE_FUSED):
            by_input[argument(node, "input")].append(node)
        applied: list[Change] = []
        skipped: list[Skip] = []
        parts: list[fx.Node] = []
        strided, outputs = strides_read(program), returned(program)
        for nodes in by_input.values():
            if len(nodes) < 2:
                continue
            mergeable = []
            for node in nodes:
                reason = STRIDES_READ if node in strided else _obstacle(program, node)
                if reason is None and node in outputs:
                    reason = "an output would be a part of a larger tensor"
                if reason is None:
                    mergeable.append(node)
                else:
                    skipped.append(Skip(self.name, node.name, reason))
            if len(mergeable) > 1:
                names = ", ".join(label(node) for node in mergeable)
                parts += _merge(program, mergeable)
                applied.append(Change(self.name, mergeable[0].name, names))
        loosen_layout(parts)
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


def _obstacle(program: Program, node: fx.Node) -> str | None:
    layer = as_layer(node)
    if layer is None:
        return f"it is fused with what follows it ({COMPOSITES[node.target].name})"  # type: ignore[index]
    reason = layer.not_constant(program)
    if reason:
        return reason
    weight = argument(node, "weight")
    if len(weight.users) > 1:
        return f"its weight is also used by {used_by(weight, besides=node)}"
    return None


def _merge(program: Program, group: list[fx.Node]) -> list[fx.Node]:
    """Replace the group by one linear layer and a split; returns what each layer became."""
    first = group[0]
    weights = [argument(node, "weight") for node in group]
    biases = [argument(node, "bias") for node in group]
    sizes = [shape(weight)[0] for weight in weights]
    hint = f"merged_{weights[0].target}"
    weight = add_constant(program, first, hint, torch.cat([_tensor(program, w) for w in weights]))
    bias = None
    if any(b is not None for b in biases):
        like = _tensor(program, weights[0])
        values = [
            like.new_zeros(size) if b is None else _tensor(program, b) for b, size in zip(biases, sizes, strict=True)
        ]
        bias = add_constant(program, first, f"{hint.removesuffix('weight')}bias", torch.cat(values))
    graph = program.graph
    with graph.inserting_before(first):
        merged = graph.call_function(aten.linear.default, (argument(first, "input"), weight, bias))
        pieces = graph.call_function(aten.split_with_sizes.default, (merged, sizes, len(shape(first)) - 1))
        outputs = [graph.call_function(operator.getitem, (pieces, i)) for i in range(len(group))]
    known = dims(first)
    if known is not None:
        merged.meta["dims"] = (*known[:-1], sum(sizes))
    for key in ("nn_module_stack", "stack_trace"):
        if key in first.meta:
            merged.meta[key] = pieces.meta[key] = first.meta[key]
    for node, output in zip(group, outputs, strict=True):
        replace(node, output)
    erase_unused((*weights, *biases))
    return outputs


def _tensor(program: Program, node: fx.Node) -> Tensor:
    value = constant_of(program, node)
    assert value is not None
    return value.detach()
