"""Evaluate what depends on constants alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.rewrite import add_constant, constant_of, is_random, returned

FREE_BYTES = 1 << 20
"""A folded value up to this size may be larger than what it replaces."""


class FoldConstants(Pass):
    """Replace expressions of constants by their values.

    So that weights never grow unreasonably, a value is folded only if it is no larger than the operands that nothing
    but constant expressions use, or than 1 MiB. Dequantize operators stay: folding them would undo a quantization.
    Random operators stay.
    """

    name = "fold-constants"
    summary = "Evaluate expressions of constants ahead of time."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        foldable = _constant_expressions(program, skipped)
        used = {operand for node in foldable for operand in node.all_input_nodes}
        values: dict[fx.Node, Any] = {}
        for node in [node for node in program.graph.nodes if node in foldable]:
            operands = node.all_input_nodes
            if any(operand.op == "call_function" and operand not in values for operand in operands):
                continue  # an operand was too large to fold, which was said there
            known = {n: values[n] if n in values else constant_of(program, n) for n in operands}
            with torch.no_grad():
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                value = node.target(*args, **kwargs)
            released = sum(_bytes(known[n]) for n in operands if all(user in foldable for user in n.users))
            if _bytes(value) > max(FREE_BYTES, released):
                reason = f"its value would add {(_bytes(value) - released) / 2**20:.1f} MiB of constants"
                skipped.append(Skip(self.name, node.name, reason))
            else:
                values[node] = value
        for node, value in values.items():
            if any(user not in values for user in node.users) and _materialise(program, node, value):
                applied.append(Change(self.name, node.name))
        for node in reversed([n for n in program.graph.nodes if n in values or n.op == "get_attr"]):
            if not node.users and (node in values or node in used):
                program.graph.erase_node(node)
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


def _constant_expressions(program: Program, skipped: list[Skip]) -> set[fx.Node]:
    """Every operator all of whose operands are constants or such operators, and that may be evaluated."""
    found: set[fx.Node] = set()
    outputs = returned(program)
    for node in program.graph.nodes:
        if node.op != "call_function" or not node.users:
            continue
        if not all(n in found or constant_of(program, n) is not None for n in node.all_input_nodes):
            continue
        target = str(node.target)
        if is_random(node) or target.startswith(("aten.empty", "aten.new_empty")):
            skipped.append(Skip("fold-constants", node.name, "its value is not determined"))
        elif node in outputs:
            skipped.append(Skip("fold-constants", node.name, "an output would be the same tensor as a constant"))
        elif "dequantize" in target:
            skipped.append(Skip("fold-constants", node.name, "folding it would undo a quantization"))
        else:
            found.add(node)
    return found


def _bytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _materialise(program: Program, node: fx.Node, value: Any) -> bool:
    """Let the users of ``node`` use its value: a tensor as a new constant, a number in place."""
    if isinstance(value, Tensor):
        constant = add_constant(program, node, f"folded_{node.name}", value.clone())
        constant.meta.update({key: known for key, known in node.meta.items() if key != "val"})
        node.replace_all_uses_with(constant)
        return True
    if isinstance(value, (bool, int, float)):
        for user in list(node.users):
            user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)
        return True
    return False  # several tensors: the getitems that take them apart are folded in their turn
