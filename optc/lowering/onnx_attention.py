"""Attention as ONNX's operator takes it: four dimensions, all of one batch, and a mask with a row for each query."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from optc.program import Program, complete_meta
from optc.rewrite import argument, calls, dims, replace, shape

aten = torch.ops.aten
_POSITIONAL, _BY_NAME = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), ("scale", "enable_gqa")


def fit_attention(program: Program) -> None:
    """Write each attention, in place, such that it can be exported and onnxruntime runs it.

    Queries, keys and values of (batch, tokens, width) get a dimension for their one head; those that are the same for
    all samples or heads are repeated, as is a mask that is the same for all queries, or for all keys. What is new has
    the attention's name in ``meta["part_of"]``.
    """
    for node in calls(program, aten.scaled_dot_product_attention.default):
        _fit(node)
    complete_meta(program)
    program.module.recompile()


def _fit(node: fx.Node) -> None:
    *given, mask, dropout, causal = (argument(node, name) for name in _POSITIONAL)
    rank = 0 if mask is None else len(shape(mask))
    repeats = mask is not None and shape(mask)[-2:] != (shape(given[0])[-2], shape(given[1])[-2])
    ranks = {len(shape(operand)) for operand in given}
    operands = _of_one_batch(node, given) if len(ranks) == 1 else given
    if repeats:
        sizes = [_part(node, aten.sym_size.int, operand, -2) for operand in operands[:2]]
        mask = _part(node, aten.expand.default, mask, [-1] * (rank - 2) + sizes)
    one_head = ranks == {3}
    if one_head:
        operands = [_part(node, aten.unsqueeze.default, operand, 1) for operand in operands]
        mask = _part(node, aten.unsqueeze.default, mask, 1) if rank == 3 else mask
    if repeats or operands != given:
        options = {name: argument(node, name) for name in _BY_NAME}
        new = _part(node, aten.scaled_dot_product_attention.default, *operands, mask, dropout, causal, **options)
        replace(node, _part(node, aten.squeeze.dim, new, 1) if one_head else new)


def _of_one_batch(node: fx.Node, operands: list[fx.Node]) -> list[fx.Node]:
    """Queries, keys and values with as many samples and heads each, as PyTorch broadcasts them."""
    known = [dims(operand) or shape(operand) for operand in operands]
    rank = len(known[0])
    for axis in range(rank - 3 if argument(node, "enable_gqa") else rank - 2):
        single = [sizes[axis] == 1 for sizes in known]
        if any(single) and not all(single):
            size = _part(node, aten.sym_size.int, operands[single.index(False)], axis)
            sizes = [size if each == axis else -1 for each in range(rank)]
            operands = [
                _part(node, aten.expand.default, operand, sizes) if repeat else operand
                for operand, repeat in zip(operands, single, strict=True)
            ]
    return operands


def _part(node: fx.Node, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
    """A node in front of another that takes part in what that computed."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs)
    new.meta["part_of"] = node.meta.get("part_of", node.name)
    return new
