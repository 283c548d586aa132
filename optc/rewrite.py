"""Small helpers for writing passes: look at nodes, add constants, replace nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from optc.program import Program, get_constant
from optc.program import complete_meta as complete_meta

Target = Callable[..., Any]
aten, _qd = torch.ops.aten, torch.ops.quantized_decomposed
QUANTIZERS = (_qd.quantize_per_tensor.default, _qd.quantize_per_channel.default)
"""The operators that round to integers by constant scales."""
DEQUANTIZERS = (
    _qd.dequantize_per_tensor.default,
    _qd.dequantize_per_channel.default,
    _qd.dequantize_per_channel_group.default,
)
"""The operators that give what integers stand for, by constant scales."""


def calls(program: Program, *targets: Target) -> Iterator[fx.Node]:
    """Each ``call_function`` node of one of the targets, in graph order; safe to erase while iterating."""
    wanted = set(targets)
    for node in list(program.graph.nodes):
        if node.op == "call_function" and node.target in wanted:
            yield node


def is_call(node: object, *targets: Target) -> bool:
    """Whether ``node`` is a ``call_function`` of one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def is_quantize(node: object) -> bool:
    """Whether a node rounds to integers, by constant scales or by scales found at run time."""
    return _operator(node).startswith("quantize_per_")


def is_dequantize(node: object) -> bool:
    """Whether a node gives what integers stand for, by constant scales or by scales found at run time."""
    return _operator(node).startswith("dequantize_per_")


def _operator(node: object) -> str:
    """An operator's name without those of its library and its overload; empty for what calls none."""
    schema = getattr(getattr(node, "target", None), "_schema", None)
    return "" if schema is None else str(schema.name).partition("::")[2]


def is_quantized(program: Program) -> bool:
    """Whether anything in the graph is quantized, weights included."""
    return any(is_quantize(node) or is_dequantize(node) for node in program.graph.nodes)


def quantized_attention(program: Program) -> list[fx.Node]:
    """The attention operators whose queries are rounded to integers, for a kernel that multiplies those by the keys."""
    attention = calls(program, aten.scaled_dot_product_attention.default)
    return [node for node in attention if is_dequantize(node.args[0])]


def argument(node: fx.Node, name: str) -> Any:
    """An ATen node's argument by schema name, given by position, by keyword, or its default."""
    schema = node.target._schema  # type: ignore[union-attr]
    for position, parameter in enumerate(schema.arguments):
        if parameter.name == name:
            if position < len(node.args):
                return node.args[position]
            return node.kwargs.get(name, parameter.default_value)
    raise KeyError(f"{node.target} has no argument {name!r}")


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """All of an ATen node's arguments in the schema's order, defaults included."""
    return tuple(argument(node, parameter.name) for parameter in node.target._schema.arguments)  # type: ignore[union-attr]


def set_argument(node: fx.Node, name: str, value: fx.node.Argument) -> None:
    """Set an ATen node's argument by schema name, filling in defaults of the positional arguments before it."""
    schema = node.target._schema  # type: ignore[union-attr]
    args = list(node.args)
    for position, parameter in enumerate(schema.arguments):
        if parameter.kwarg_only or parameter.name in node.kwargs:
            if parameter.name == name:
                node.kwargs = {**node.kwargs, name: value}
                return
        else:
            if position >= len(args):
                args.append(parameter.default_value)
            if parameter.name == name:
                args[position] = value
                node.args = tuple(args)
                return
    raise KeyError(f"{node.target} has no argument {name!r}")


def constant_of(program: Program, node: object) -> Tensor | None:
    """The tensor behind a ``get_attr`` node, or ``None`` if ``node`` is anything else. Never write into it."""
    if not (isinstance(node, fx.Node) and node.op == "get_attr"):
        return None
    value = get_constant(program.module, str(node.target))
    return value if isinstance(value, Tensor) else None


def add_constant(program: Program, before: fx.Node, hint: str, value: Tensor) -> fx.Node:
    """Add a tensor as a new constant and return its ``get_attr`` node, placed before ``before``.

    Args:
        hint: name to derive from, usually the constant it replaces; dots and clashes are taken care of.
    """
    numbers: dict[str, int] = program.module.meta.setdefault("constant_numbers", {})
    base = hint.replace(".", "_")
    name = base
    while hasattr(program.module, name):
        numbers[base] = numbers.get(base, 0) + 1
        name = f"{base}_{numbers[base]}"
    program.module.register_buffer(name, value.detach())
    with program.graph.inserting_before(before):
        return program.graph.get_attr(name)


def shape(node: fx.Node) -> tuple[int, ...]:
    """Static shape of a tensor-valued node at the example inputs (batch size as theirs)."""
    return tuple(int(size) for size in node.meta["val"].shape)


def strides(node: fx.Node) -> tuple[int, ...]:
    """Static strides of a tensor-valued node at the example inputs; empty for what is no tensor."""
    value = node.meta.get("val")
    return value.stride() if isinstance(value, Tensor) else ()


def dims(node: fx.Node) -> tuple[int | str, ...] | None:
    """Sizes of a tensor-valued node at any batch: numbers, and expressions such as ``"8*s0"`` where they vary.

    ``None`` where this is not known (a node made by a pass that did not say); do not take two shapes for equal then.
    """
    known: tuple[int | str, ...] | None = node.meta.get("dims")
    return known


def dtype(node: fx.Node) -> torch.dtype:
    """Data type of a tensor-valued node."""
    value: torch.dtype = node.meta["val"].dtype
    return value


def only_user(node: fx.Node) -> fx.Node | None:
    """The single node that uses ``node``, or ``None`` if there are several or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let every user of ``node`` use ``new`` instead, hand on what is known of the node, and erase it.

    ``new.meta["replaces"]`` remembers the node's name, so verification can compare the two if the outputs diverge.
    """
    for key, value in node.meta.items():
        new.meta.setdefault(key, value)
    new.meta["replaces"] = node.name
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def erase_unused(nodes: Iterable[object]) -> None:
    """Erase those of the given arguments that are nodes nothing uses any more (constants a rewrite has replaced)."""
    for node in nodes:
        if isinstance(node, fx.Node) and not node.users and not node._erased:
            node.graph.erase_node(node)


def label(node: fx.Node) -> str:
    """A node's name with the path of the module it came from: ``"conv2d_3 (layer1.0.conv2)"``."""
    path = module_path(node)
    return f"{node.name} ({path})" if path else node.name


def module_path(node: fx.Node) -> str:
    """Dotted path, in the original model, of the module a node was captured in; empty if unknown."""
    stack = node.meta.get("nn_module_stack")
    return str(next(reversed(stack.values()))[0]) if stack else ""


def used_by(node: fx.Node, besides: fx.Node) -> str:
    """Names for people the users of ``node`` other than ``besides``: at most two, then how many more."""
    others = [user for user in node.users if user is not besides]
    names = ["an output" if user.op == "output" else label(user) for user in others[:2]]
    return ", ".join(names) + (f" and {len(others) - 2} more" if len(others) > 2 else "")


def returned(program: Program) -> set[fx.Node]:
    """What the outputs are, or are views of: callers may write into it."""
    found: set[fx.Node] = set()
    pending = program.graph.output_node().all_input_nodes
    while pending:
        node = pending.pop()
        found.add(node)
        if is_view(node):
            pending += node.all_input_nodes
    return found


def is_view(node: fx.Node) -> bool:
    """Whether a node may hand on its operand's memory."""
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))


def is_random(node: fx.Node) -> bool:
    """Whether an operator draws random numbers; layers that may drop values do so where they are told to."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    names = {each.name for each in node.target._schema.arguments}  # type: ignore[union-attr]
    chance = next((argument(node, name) for name in ("dropout_p", "dropout") if name in names), None)
    return chance != 0.0 and not any(each in names and not argument(node, each) for each in ("train", "training"))


def needed_copy(program: Program, node: fx.Node, source: fx.Node) -> str | None:
    """Why ``source`` cannot stand for its equal ``node``: an output would be memory that callers must not write into.

    That is an input's, a constant's or, where ``node`` is a value of its own, another output's or memory that holds
    several of its values in one place. ``None`` if it can.
    """
    found = returned(program)
    if node not in found:
        return None
    value = source.meta.get("val")
    if not is_view(node) and isinstance(value, Tensor) and _may_overlap(value):
        return "an output would hold several of its values in one place"
    owner = source
    while is_view(owner):
        owner = owner.all_input_nodes[0]
    if owner.op != "call_function":
        return f"an output would be the same tensor as {owner.name}"
    return "two outputs would be the same tensor" if owner in found and not is_view(node) else None


def _may_overlap(value: Tensor) -> bool:
    """Whether elements may share memory, as those of expanded values and of overlapping windows do."""
    reach = 0  # of the dimensions so far, from the smallest step on
    for step, size in sorted((step, size) for step, size in zip(value.stride(), value.shape, strict=True) if size != 1):
        if step <= reach:
            return True
        reach += (size - 1) * step
    return False


DENSE_READERS = (aten.view_as_complex.default, aten.view.dtype)
"""Operators that take dense values only, and have no form that copies where it must."""

STRIDES_READ = "an as_strided takes it apart by the strides it was captured with"


def strides_read(program: Program) -> set[fx.Node]:
    """The values whose strides some ``as_strided`` depends on: no rewrite may change those."""
    found: set[fx.Node] = set()
    pending = [operand for node in calls(program, aten.as_strided.default) for operand in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [] if _fixes_layout(node) else node.all_input_nodes
    return found


def loosen_layout(nodes: Iterable[fx.Node]) -> None:
    """Say that the strides of these nodes' values may no longer be those captured.

    Every view that depends on one of them becomes a ``reshape``, which computes the same and copies where a view is
    impossible; other operators that want dense values are given a copy. Nothing helps an ``as_strided``: do not change
    the layout of what is in :func:`strides_read`. Linear in the nodes reached.
    """
    seen: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        for user in list(node.users):
            if is_call(user, aten.view.default, aten._unsafe_view.default):
                user.target = aten.reshape.default
            elif is_call(user, *DENSE_READERS):
                user.replace_input_with(node, _dense_copy(node, user))
            if not _fixes_layout(user):
                pending.append(user)


def _fixes_layout(node: fx.Node) -> bool:
    """Whether a node's output is contiguous whatever its input's strides."""
    if is_call(node, aten.clone.default, aten.contiguous.default):
        return argument(node, "memory_format") is torch.contiguous_format
    return is_call(node, aten.linear.default, aten.layer_norm.default)


def _dense_copy(node: fx.Node, user: fx.Node) -> fx.Node:
    """A contiguous copy of ``node`` right before ``user``."""
    with node.graph.inserting_before(user):
        copy = node.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    copy.meta = {key: user.meta[key] for key in ("nn_module_stack", "stage") if key in user.meta}
    if "dims" in node.meta:
        copy.meta["dims"] = node.meta["dims"]
    if "val" in node.meta:
        copy.meta["val"] = node.meta["val"].contiguous()
    return copy
