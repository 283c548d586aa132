"""What each node of a graph has to do: operations by PyTorch's counter, bytes as the graph stores its values."""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

from optc.ops.composites import COMPOSITES, Composite
from optc.program import Program
from optc.rewrite import dims

aten = torch.ops.aten
_PICKS = frozenset(("embedding", "index", "index_select"))
"""Operators that read no more of their table than they write."""
_MOVES = _PICKS | {"cat", "clone", "constant_pad_nd", "copy", "pad", "roll", "slice", "stack", "to", "_to_copy"}
"""Operators that compute nothing, besides views."""


def _attention(query: list[int], key: list[int], value: list[int], *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


_FORMULAS = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""What PyTorch's counter lacks."""


@dataclass(frozen=True)
class NodeCost:
    """What one operator has to do for a query.

    Attributes:
        node, operator, module: its name, what it calls, and the path of the module it came from (may be empty).
        operations: multiplications and additions, a fused multiply-add counted as two.
        constant_bytes: what it reads of weights and other constants, as they are stored.
        reads: by the node that made the value, bytes of what it reads of it; views and dequantizations are looked
            through, so that what was quantized counts as integers. Inputs of the model are such nodes too.
        writes: bytes of its result, as integers where only quantizations read it.
        result: whether it is, or is viewed as, an output of the model.
    """

    node: str
    operator: str
    module: str
    operations: float
    constant_bytes: int
    reads: Mapping[str, int]
    writes: int
    result: bool = False


def node_costs(program: Program, batch: int) -> tuple[NodeCost, ...]:
    """The cost of each operator at a batch size, in the order of the graph; views and dequantizations are left out.

    Operations of convolutions, matrix products and attention are counted by :mod:`torch.utils.flop_counter`, which
    lacks attention on CPUs: it is added here. Composites count as the layer in them, and any other operator that
    computes counts one operation for each element of the largest tensor it reads or writes. What does not vary with the
    batch counts as it is.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    scale = batch / len(program.example_inputs[0]) if program.dynamic_batch else 1.0
    varying = _varying(program)
    found = []

    def elements(node: fx.Node) -> float:
        return _elements(node) * (scale if node in varying else 1.0)

    for node in program.graph.nodes:
        if node.op != "call_function" or _is_transparent(node) or _value(node) is None:
            continue
        operands = [operand for operand in node.all_input_nodes if _value(operand) is not None]
        reads: dict[fx.Node, float] = defaultdict(float)
        for operand in operands:
            picked = _schema_name(node) in _PICKS and operand is node.args[0]
            read = min(elements(operand), elements(node)) if picked else elements(operand)
            for source in _constants(operand) or [_source(operand)]:
                # Of several views of a value it reads each, but no more than there is.
                reads[source] = min(reads[source] + read * _item(source), elements(source) * _item(source))
        written = _written(node)
        found.append(
            NodeCost(
                node=node.name,
                operator=str(node.target),
                module=_module(node),
                operations=_operations(node, counter) * (1.0 if varying.isdisjoint((node, *operands)) else scale),
                constant_bytes=round(sum(size for source, size in reads.items() if source.op == "get_attr")),
                reads={source.name: round(size) for source, size in reads.items() if source.op != "get_attr"},
                writes=round(elements(written) * _item(written)),
                result=_is_result(node),
            )
        )
    return tuple(found)


class CostGraph(dict[str, NodeCost]):
    """The costs of a whole graph by node, to ask what several nodes run as one have to do."""

    def __init__(self, costs: Iterable[NodeCost]) -> None:
        super().__init__((cost.node, cost) for cost in costs)
        self._readers: dict[str, set[str]] = defaultdict(set)
        for cost in self.values():
            for source in cost.reads:
                self._readers[source].add(cost.node)

    def traffic(self, nodes: Collection[str]) -> tuple[float, int, int]:
        """What a kernel that runs these nodes at once has to do; what they hand on to each other stays inside.

        Returns:
            Operations, bytes of constants, and bytes of the values that come in and go out.
        """
        inside = set(nodes)
        mine = [self[node] for node in inside]
        incoming: dict[str, list[int]] = defaultdict(list)
        for cost in mine:
            for source in cost.reads.keys() - inside:
                incoming[source].append(cost.reads[source])
        written = {source: self[source].writes if source in self else 0 for source in incoming}
        reads = sum(min(sum(sizes), max(written[source], *sizes)) for source, sizes in incoming.items())
        outgoing = sum(cost.writes for cost in mine if cost.result or not self._readers[cost.node] <= inside)
        constants = sum(cost.constant_bytes for cost in mine)
        return sum(cost.operations for cost in mine), constants, reads + outgoing


def _varying(program: Program) -> set[fx.Node]:
    """The values whose sizes vary with the batch; one that does not say does if anything that it is made from does."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        known = dims(node)
        if known is None:
            varies = node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes)
        else:
            varies = any(isinstance(size, str) for size in known)
        if varies:
            found.add(node)
    return found


def _operations(node: fx.Node, counter: FlopCounterMode) -> float:
    target = node.target
    if not isinstance(target, OpOverload):
        return 0.0
    if _schema_name(node) in _MOVES:
        return 0.0
    if target not in COMPOSITES and torch.Tag.pointwise not in target.tags:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
        fake: Any = _value(node)
        with torch.no_grad(), fake.fake_mode, counter:  # entering it sets the counter to 0
            target(*args, **kwargs)
        counted = counter.get_total_flops()
        if counted:
            return float(counted)
    if target in COMPOSITES:
        return _composite_operations(COMPOSITES[target], node)
    tensors = [node, *(operand for operand in node.all_input_nodes if not _constants(operand))]
    return float(max(_elements(tensor) for tensor in tensors))


def _composite_operations(row: Composite, node: fx.Node) -> float:
    x, weight = (operand.meta["val"] for operand in node.args[:2] if isinstance(operand, fx.Node))
    if row.is_conv:
        batch = [1] * (4 - x.dim())  # which an image may lack
        return float(conv_flop_count([*batch, *x.shape], list(weight.shape), [*batch, *node.meta["val"].shape]))
    return 2.0 * int(x.numel()) * len(weight)


def _schema_name(node: fx.Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", "")).rpartition("::")[2]


def _is_quantize(node: fx.Node) -> bool:
    return _schema_name(node).startswith("quantize_")


def _is_transparent(node: fx.Node) -> bool:
    """Whether a node changes how a value is looked at, or picks one of several, not the value in memory."""
    return (
        node.target is operator.getitem
        or bool(getattr(node.target, "is_view", False))
        or _schema_name(node).startswith(("dequantize_", "_unsafe_view"))  # a view whose schema does not say so
    )


def _source(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and _is_transparent(node):
        node = node.all_input_nodes[0]
    return node


def _constants(node: fx.Node) -> list[fx.Node]:
    """The constants that a value is a view or dequantization of; none if inputs of the model have a part in it."""
    if node.op == "get_attr":
        return [node]
    if node.op != "call_function" or not _is_transparent(node):
        return []
    found = [_constants(operand) for operand in node.all_input_nodes if _value(operand) is not None]
    return [constant for each in found for constant in each] if all(found) else []


def _readers(node: fx.Node) -> Iterable[fx.Node]:
    for user in node.users:
        if user.op == "call_function" and _is_transparent(user):
            yield from _readers(user)
        else:
            yield user


def _written(node: fx.Node) -> fx.Node:
    """The node whose value it stores: its own, or the integers where only quantizations read it."""
    readers = list(_readers(node))
    quantized = bool(readers) and all(map(_is_quantize, readers)) and not _is_quantize(node)
    return readers[0] if quantized else node


def _is_result(node: fx.Node) -> bool:
    return any(reader.op == "output" for reader in _readers(node))


def _value(node: fx.Node) -> Tensor | None:
    """A node's value as the fake tensor it is, or the first one of a tuple, of which the others are statistics."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return next((each for each in values if isinstance(each, Tensor)), None)


def _elements(node: fx.Node) -> int:
    value = _value(node)
    return 0 if value is None else math.prod(map(int, value.shape))


def _item(node: fx.Node) -> int:
    value = _value(node)
    return 0 if value is None else value.element_size()


def _module(node: fx.Node) -> str:
    """Dotted path of the innermost module of the original model that a node came from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return next((path for path, _ in reversed(stack) if path and not path.startswith("_empty_")), "")
