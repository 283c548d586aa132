"""Remove operators that hand on their input unchanged: dropout when not training, no-op views, casts and arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.rewrite import (
    DENSE_READERS,
    STRIDES_READ,
    argument,
    calls,
    constant_of,
    dims,
    dtype,
    erase_unused,
    is_call,
    loosen_layout,
    module_path,
    needed_copy,
    set_argument,
    shape,
    strides,
    strides_read,
)
from optc_passes.layers import CONVOLUTIONS, LINEARS, TRANSPOSED

aten = torch.ops.aten


class RemoveIdentity(Pass):
    """Let users of an operator that changes no value use its input instead.

    Copies (``clone``, ``contiguous``) mean nothing in a functional graph. One asked for in another memory format than
    its input has stays, as a choice of layout; ``merge-views`` takes those that only serve a view. A copy that keeps a
    program output from sharing the memory of an input, a constant or another output stays too. A layer's bias of zeros
    is an addition that changes no value.
    """

    name = "remove-identity"
    summary = (
        "Remove operators that hand on their input unchanged: dropout, no-op views and casts, copies, zero biases."
    )

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        relaid: list[fx.Node] = []
        strided = strides_read(program)
        for node in list(program.graph.nodes):
            rule = _RULES.get(node.target) if node.op == "call_function" and node.users else None
            if rule is None or not rule(program, node):
                continue
            source: fx.Node = node.args[0]
            users = list(node.users)
            if is_call(node, aten.native_dropout.default):
                if any(user.args[1] != 0 and user.users for user in users):
                    skipped.append(Skip(self.name, node.name, "its mask is used"))
                    continue
                replaced = [user for user in users if user.args[1] == 0]
            else:
                replaced = [node]
            if reason := STRIDES_READ if node in strided else needed_copy(program, node, source):
                skipped.append(Skip(self.name, node.name, reason))
                continue
            if strides(node) != strides(source) or is_call(node, aten.clone.default, aten.contiguous.default):
                relaid.append(source)
            for old in replaced:
                old.replace_all_uses_with(source)
            for old in (*(user for user in users if replaced != [node]), node):
                program.graph.erase_node(old)
            applied.append(Change(self.name, node.name, str(node.target).removeprefix("aten.").split(".")[0]))
        loosen_layout(relaid)
        applied += _drop_zero_biases(program)
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


def _drop_zero_biases(program: Program) -> list[Change]:
    changes = []
    for layer in calls(program, *LINEARS, *CONVOLUTIONS, *TRANSPOSED):
        bias = argument(layer, "bias")
        tensor = constant_of(program, bias)
        if tensor is not None and not bool(tensor.any()):
            set_argument(layer, "bias", None)
            erase_unused((bias,))
            changes.append(Change(RemoveIdentity.name, layer.name, f"{module_path(layer)} bias of zeros".strip()))
    return changes


def _same_dims(node: fx.Node) -> bool:
    """Whether output and input have equal sizes at any batch."""
    before, after = dims(node.args[0]), dims(node)  # type: ignore[arg-type]
    return before is not None and before == after


def _not_training(program: Program, node: fx.Node) -> bool:
    """Dropout outside training, or of nothing."""
    return argument(node, "train") is False or argument(node, "p") == 0


def _always(program: Program, node: fx.Node) -> bool:
    return True


def _copy(program: Program, node: fx.Node) -> bool:
    """A copy that keeps or does not choose the memory format, and is not there to make a value dense."""
    if any(is_call(user, *DENSE_READERS) for user in node.users):
        return False
    chosen = argument(node, "memory_format")
    free = chosen is None or chosen is torch.preserve_format
    if is_call(node, aten.contiguous.default):
        free = False
    return free or strides(node) == strides(node.args[0])  # type: ignore[arg-type]


def _cast(program: Program, node: fx.Node) -> bool:
    """A cast to the type, device and layout a tensor already has."""
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return all(getattr(before, what) == getattr(after, what) for what in ("dtype", "device", "layout")) and (
        strides(node) == strides(node.args[0])  # type: ignore[arg-type]
    )


def _same_shape(program: Program, node: fx.Node) -> bool:
    """A row-major reshape to the shape it had, or pooling to the size the image has."""
    return _same_dims(node)


def _no_permutation(program: Program, node: fx.Node) -> bool:
    rank = len(shape(node))
    return [d % rank for d in argument(node, "dims")] == list(range(rank))


def _no_transposition(program: Program, node: fx.Node) -> bool:
    rank = len(shape(node))
    return rank == 0 or argument(node, "dim0") % rank == argument(node, "dim1") % rank


def _whole_slice(program: Program, node: fx.Node) -> bool:
    start, step = argument(node, "start"), argument(node, "step")
    return start in (None, 0) and step == 1 and (argument(node, "end") in (None, 2**63 - 1) or _same_dims(node))


def _no_pad(program: Program, node: fx.Node) -> bool:
    return all(isinstance(p, int) and p == 0 for p in argument(node, "pad"))


def _no_roll(program: Program, node: fx.Node) -> bool:
    return all(isinstance(s, int) and s == 0 for s in argument(node, "shifts"))


def _one_by_one_pool(program: Program, node: fx.Node) -> bool:
    """Pooling over single pixels."""
    ones = all(k == 1 for k in argument(node, "kernel_size")) and all(s == 1 for s in argument(node, "stride"))
    divisor = argument(node, "divisor_override") if is_call(node, aten.avg_pool2d.default) else None
    return ones and not any(argument(node, "padding")) and divisor in (None, 1)


def _neutral(value: int) -> Callable[[Program, fx.Node], bool]:
    """Arithmetic with its neutral element as the second argument, that changes neither shape nor type."""

    def rule(program: Program, node: fx.Node) -> bool:
        operand, value_in = argument(node, "other"), node.args[0]
        tensor = constant_of(program, operand)
        if tensor is not None and tensor.numel() == 1 and _same_dims(node):
            operand = tensor.item()
        if isinstance(operand, bool) or not isinstance(operand, (int, float)) or operand != value:
            return False
        return isinstance(value_in, fx.Node) and dtype(value_in) == dtype(node)

    return rule


_RULES: dict[object, Callable[[Program, fx.Node], bool]] = {
    aten.dropout.default: _not_training,
    aten.feature_dropout.default: _not_training,
    aten.alpha_dropout.default: _not_training,
    aten.native_dropout.default: _not_training,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.clone.default: _copy,
    aten.contiguous.default: _copy,
    aten._to_copy.default: _cast,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.view.default: _same_shape,
    aten._unsafe_view.default: _same_shape,
    aten.reshape.default: _same_shape,
    aten.flatten.using_ints: _same_shape,
    aten.expand.default: _same_shape,
    aten.squeeze.default: _same_shape,
    aten.squeeze.dim: _same_shape,
    aten.squeeze.dims: _same_shape,
    aten.permute.default: _no_permutation,
    aten.transpose.int: _no_transposition,
    aten.slice.Tensor: _whole_slice,
    aten.pad.default: _no_pad,
    aten.constant_pad_nd.default: _no_pad,
    aten.roll.default: _no_roll,
    aten.adaptive_avg_pool2d.default: _same_shape,
    aten.avg_pool2d.default: _one_by_one_pool,
    aten.max_pool2d.default: _one_by_one_pool,
    aten.mul.Tensor: _neutral(1),
    aten.div.Tensor: _neutral(1),
    aten.add.Tensor: _neutral(0),
    aten.sub.Tensor: _neutral(0),
}
