"""Attention as ONNX's operator takes it: four dimensions, and a mask with a row for each query."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from optc.program import Program, complete_meta
from optc.rewrite import argument, calls, replace, shape

aten = torch.ops.aten
_POSITIONAL, _BY_NAME = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), ("scale", "enable_gqa")


def fit_attention(program: Program) -> None:
    """Write each attention, in place, such that it can be exported and onnxruntime runs it.

    Queries, keys and values of (batch, tokens, width) get a dimension for their one head, and a mask that is the same
    for all queries, or for all keys, is repeated. What is new has the attention's name in ``meta["part_of"]``.
    """
    for node in calls(program, aten.scaled_dot_product_attention.default):
        _fit(node)
    complete_meta(program)
    program.module.recompile()


def _fit(node: fx.Node) -> None:
    query, key, value, mask, *rest = (argument(node, name) for name in _POSITIONAL)
    rank = 0 if mask is None else len(shape(mask))
    repeats = mask is not None and shape(mask)[-2:] != (shape(query)[-2], shape(key)[-2])
    one_head = len(shape(query)) == len(shape(key)) == len(shape(value)) == 3
    if repeats:
        sizes = [_part(node, aten.sym_size.int, operand, -2) for operand in (query, key)]
        mask = _part(node, aten.expand.default, mask, [-1] * (rank - 2) + sizes)
    if one_head:
        query, key, value = (_part(node, aten.unsqueeze.default, operand, 1) for operand in (query, key, value))
        mask = _part(node, aten.unsqueeze.default, mask, 1) if rank == 3 else mask
    if repeats or one_head:
        options = {name: argument(node, name) for name in _BY_NAME}
        new = _part(node, aten.scaled_dot_product_attention.default, query, key, value, mask, *rest, **options)
        replace(node, _part(node, aten.squeeze.dim, new, 1) if one_head else new)


def _part(node: fx.Node, target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
    """A node in front of another that takes part in what that computed."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args, kwargs)
    new.meta["part_of"] = node.meta.get("part_of", node.name)
    return new
