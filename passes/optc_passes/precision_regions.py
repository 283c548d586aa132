"""Where a quantized program computes in float: behind its quantized layers, and up to the next quantize operator."""

from __future__ import annotations

from torch import fx

from optc import Program
from optc.ops import COMPOSITES
from optc.rewrite import calls, is_dequantize, is_quantize
from optc_passes.precision_rules import operator_name, role
from optc_passes.quant_split import split_composite


def is_quantized_product(node: fx.Node) -> bool:
    """Whether a node is a product with a weight that is stored as integers."""
    constants = [n for n in node.all_input_nodes if is_dequantize(n) and n.all_input_nodes[0].op == "get_attr"]
    return role(node) == "product" and bool(constants)


def inner(program: Program) -> set[fx.Node]:
    """Operators whose value goes into quantize operators or outputs alone, through none or a chain of others.

    Kernels of quantized layers, or one behind them, compute such a chain while they write the integers.
    """
    found: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        users = [user for user in node.users if operator_name(user) != "sym_size"]
        if node.op != "call_function" or not users:
            continue
        ends = all(is_quantize(user) or user.op == "output" for user in users)
        if ends or (len(users) == 1 and users[0] in found):
            found.add(node)
    return found


def split_residuals(program: Program) -> list[str]:
    """Split, in place, quantized layers that add a residual, so that the sum can have a type of its own.

    Returns:
        Names of the layers.
    """
    names = []
    for node in calls(program, *COMPOSITES):
        if COMPOSITES[node.target].residual and is_quantized_product(node):  # type: ignore[index]
            names.append(node.name)
            split_composite(node)
    return names
