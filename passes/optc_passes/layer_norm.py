"""Fold a layer norm's affine part into the linear layers that read it.

Ba, Kiros and Hinton 2016, "Layer Normalization" (arXiv:1607.06450): ``LN(x) = γ·x̂ + β``; a following linear layer
computes ``W(γ·x̂ + β) + b = (W·diag γ)x̂ + (b + Wβ)``.
"""

from __future__ import annotations

import torch
from torch import fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.rewrite import argument, calls, constant_of, erase_unused, module_path, set_argument, shape
from optc_passes.affine import fold_after

_LAYER_NORM = torch.ops.aten.layer_norm.default


class FoldLayerNorm(Pass):
    """Where only linear layers read a layer norm, give them its γ and β; the norm keeps just its normalisation."""

    name = "fold-layer-norm"
    summary = "Fold layer norms' weight and bias into the linear layers that read them."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        for node in calls(program, _LAYER_NORM):
            if argument(node, "weight") is None and argument(node, "bias") is None:
                continue
            done, what = _fold(program, node)
            if done:
                applied.append(Change(self.name, node.name, what))
            else:
                skipped.append(Skip(self.name, node.name, what))
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


def _fold(program: Program, node: fx.Node) -> tuple[bool, str]:
    if len(argument(node, "normalized_shape")) != 1:
        return False, "it normalises over several dimensions"
    channels = shape(node)[-1]
    scale = torch.ones(channels, dtype=torch.float64)
    shift = None
    constants = [argument(node, name) for name in ("weight", "bias")]
    tensors = [constant_of(program, constant) for constant in constants]
    for name, constant, tensor in zip(("weight", "bias"), constants, tensors, strict=True):
        if constant is not None and tensor is None:
            return False, f"its {name} is not a constant"
    if tensors[0] is not None:
        scale = tensors[0].detach().double()
    if tensors[1] is not None:
        shift = tensors[1].detach().double()
    done, what = fold_after(program, node, len(shape(node)) - 1, scale, shift)
    if done:
        set_argument(node, "weight", None)
        set_argument(node, "bias", None)
        erase_unused(constants)
        what = f"{module_path(node)} {what}".strip()
    return done, what
