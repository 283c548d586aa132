"""Fold inference batch normalisation into the convolution or linear layer beside it.

Ioffe and Szegedy 2015, "Batch Normalization" (arXiv:1502.03167), section 3.1: with running statistics the normalisation
is ``scale·x + shift`` with ``scale = γ/√(σ² + ε)`` and ``shift = β − μ·scale``, which a linear layer can absorb.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.rewrite import (
    STRIDES_READ,
    argument,
    calls,
    constant_of,
    dtype,
    erase_unused,
    is_call,
    module_path,
    strides_read,
)
from optc_passes.affine import fold_beside, hand_on

aten = torch.ops.aten
_INFERENCE = aten._native_batch_norm_legit_no_training.default
_MODE_GIVEN = (aten.batch_norm.default, aten.native_batch_norm.default, aten._native_batch_norm_legit.default)
_BATCH_STATISTICS = aten._native_batch_norm_legit.no_stats


class FoldBatchNorm(Pass):
    """Fold each batch norm into the layer before it or else into all layers after it, computing in float64."""

    name = "fold-batch-norm"
    summary = "Fold inference batch norms into the convolution or linear layer beside them."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        strided = strides_read(program)
        for node in calls(program, _INFERENCE, _BATCH_STATISTICS, *_MODE_GIVEN):
            done, what = (False, STRIDES_READ) if node in strided else _fold(program, node)
            if done:
                applied.append(Change(self.name, node.name, what))
            else:
                skipped.append(Skip(self.name, node.name, what))
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


@dataclass(frozen=True)
class _Norm:
    value: fx.Node
    output: fx.Node
    scale: Tensor
    shift: Tensor


def _fold(program: Program, node: fx.Node) -> tuple[bool, str]:
    norm = _read(program, node)
    if isinstance(norm, str):
        return False, norm
    done, what = fold_beside(program, node, norm.value, norm.output, 1, norm.scale, norm.shift)
    if not done:
        return False, what
    path = module_path(node)
    hand_on(norm.value, norm.output)
    erase_unused((*node.users, node, *node.args[1:]))
    return True, f"{path} {what}".strip()


def _read(program: Program, node: fx.Node) -> _Norm | str:
    """Scale, shift, input and output of a batch norm, or why it cannot be folded."""
    if is_call(node, _BATCH_STATISTICS) or (is_call(node, *_MODE_GIVEN) and argument(node, "training")):
        return "it normalises with the statistics of each batch (training mode)"
    output = node
    if not is_call(node, aten.batch_norm.default):
        used = [user for user in node.users if user.users]
        if len(used) != 1 or not is_call(used[0], operator.getitem) or used[0].args[1] != 0:
            return "its saved statistics are used" if used else "nothing uses it"
        output = used[0]
    value = argument(node, "input")
    if dtype(value) != dtype(output):
        return "its output has another data type than its input"
    tensors: dict[str, Tensor | None] = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        given = argument(node, name)
        tensors[name] = constant_of(program, given)
        if given is not None and tensors[name] is None:
            return f"its {name} is not a constant"
    mean, variance = tensors["running_mean"], tensors["running_var"]
    if mean is None or variance is None:
        return "it normalises with the statistics of each batch (no running statistics)"
    scale = torch.rsqrt(variance.detach().double() + argument(node, "eps"))
    if tensors["weight"] is not None:
        scale = scale * tensors["weight"].detach().double()
    shift = -mean.detach().double() * scale
    if tensors["bias"] is not None:
        shift = shift + tensors["bias"].detach().double()
    return _Norm(value, output, scale, shift)
