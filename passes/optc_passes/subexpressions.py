"""Compute equal expressions once."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.rewrite import constant_of, is_random, is_view, needed_copy


class MergeCommonSubexpressions(Pass):
    """Merge operators with the same target and arguments, and constants that are the same memory.

    Equal arguments are equal in type too: multiplying by ``1`` and by ``1.0`` may give different types. Random
    operators differ each time and are left alone, and outputs that were two tensors stay two.
    """

    name = "merge-common-subexpressions"
    summary = "Compute equal expressions once."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        first: dict[Hashable, fx.Node] = {}
        for node in list(program.graph.nodes):
            key = _key(program, node)
            if key is None:
                continue
            known = first.setdefault(key, node)
            if known is node:
                continue
            reason = None if node.op == "get_attr" or is_view(node) else needed_copy(program, node, known)
            if reason:
                skipped.append(Skip(self.name, node.name, reason))
            else:
                applied.append(Change(self.name, node.name, f"same as {known.name}"))
                node.replace_all_uses_with(known)
                program.graph.erase_node(node)
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


def _key(program: Program, node: fx.Node) -> Hashable | None:
    """Equal for nodes that compute the same; ``None`` for nodes that must not be merged."""
    if node.op == "get_attr":
        tensor = constant_of(program, node)
        if tensor is None or tensor.numel() == 0:
            return ("get_attr", node.target)
        signs = tensor.is_conj(), tensor.is_neg()  # of views that read the same memory otherwise
        return ("get_attr", tensor.data_ptr(), signs, tensor.device, tensor.dtype, tuple(tensor.shape), tensor.stride())
    if node.op != "call_function" or is_random(node):
        return None
    key = (node.target, _freeze(node.args), _freeze(node.kwargs))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _freeze(value: Any) -> Hashable:
    """A hashable stand-in that tells ``1``, ``1.0`` and ``True`` apart."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _freeze(item)) for name, item in sorted(value.items()))
    if isinstance(value, slice):
        return ("slice", _freeze(value.start), _freeze(value.stop), _freeze(value.step))
    if isinstance(value, float):
        return (float, value.hex())
    hashable: Hashable = value if isinstance(value, fx.Node) else (type(value), value)
    return hashable
