"""Let chains of operators that only rearrange become one."""

from __future__ import annotations

import torch
from torch import fx

from optc import Change, Pass, PassContext, PassResult, Program
from optc.rewrite import (
    DENSE_READERS,
    argument,
    calls,
    dims,
    is_call,
    label,
    loosen_layout,
    needed_copy,
    only_user,
    shape,
    strides_read,
)

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_COPIES = (aten.clone.default, aten.contiguous.default)
_PERMUTES = (aten.permute.default, aten.transpose.int)


class MergeViews(Pass):
    """A view of a view, a permute of a permute and a view of a copy become one view, permute and reshape.

    A copy whose only purpose is to allow the view goes into the reshape, which copies where it must. One that an
    operator behind the view, or who is given an output, depends on stays. Pairs of permutes that undo each other
    disappear.
    """

    name = "merge-views"
    summary = "Let chains of views, permutes and copies become one operator."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        relaid: list[fx.Node] = []
        strided = strides_read(program)
        for node in calls(program, *_VIEWS, *_PERMUTES):
            if node in strided:
                continue
            merged = []
            while (source := _take_in(program, node)) is not None:
                merged.append(source)
                if is_call(node, aten.reshape.default):
                    relaid.append(node)
            if merged:
                applied.append(Change(self.name, node.name, f"with {', '.join(merged)}"))
                _drop_if_undone(program, node, relaid)
        loosen_layout(relaid)
        return PassResult(program, bool(applied), tuple(applied))


def _take_in(program: Program, node: fx.Node) -> str | None:
    """Let ``node`` do the work of the operator before it as well, if that is possible; returns what that was called."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or only_user(source) is not node:
        return None
    if is_call(source, *_COPIES) and _read_densely(node):
        return None
    if is_call(source, *_COPIES, aten.reshape.default) and needed_copy(program, source, source.args[0]):  # type: ignore[arg-type]
        return None
    if is_call(node, *_VIEWS) and is_call(source, *_VIEWS):
        if is_call(source, aten.reshape.default):
            node.target = aten.reshape.default
        before = source.args[0]
    elif is_call(node, *_VIEWS) and is_call(source, *_COPIES):
        node.target = aten.reshape.default
        before = source.args[0]
    elif is_call(node, *_PERMUTES) and is_call(source, *_PERMUTES):
        inner, outer = _order(source), _order(node)
        before = source.args[0]
        node.target = aten.permute.default
        node.args, node.kwargs = (source, [inner[d] for d in outer]), {}
    else:
        return None
    node.replace_input_with(source, before)  # type: ignore[arg-type]
    program.graph.erase_node(source)
    return label(source)


def _read_densely(view: fx.Node) -> bool:
    """Whether an operator that takes dense values only reads ``view``, or a view of it."""
    return any(is_call(user, *DENSE_READERS) or (is_call(user, *_VIEWS) and _read_densely(user)) for user in view.users)


def _drop_if_undone(program: Program, node: fx.Node, relaid: list[fx.Node]) -> None:
    """Erase a merged operator that leaves its input as it is."""
    source: fx.Node = node.args[0]  # type: ignore[assignment]
    if is_call(node, aten.permute.default):
        undone = _order(node) == list(range(len(shape(node))))
    else:
        undone = dims(node) is not None and dims(node) == dims(source)
    if undone and not needed_copy(program, node, source):
        node.replace_all_uses_with(source)
        if is_call(node, aten.reshape.default):
            relaid.append(source)
        program.graph.erase_node(node)


def _order(node: fx.Node) -> list[int]:
    """The dimensions of the input in the order of the output's."""
    rank = len(shape(node))
    if is_call(node, aten.permute.default):
        return [d % rank for d in argument(node, "dims")]
    order = list(range(rank))
    first, second = argument(node, "dim0") % rank, argument(node, "dim1") % rank
    order[first], order[second] = order[second], order[first]
    return order
