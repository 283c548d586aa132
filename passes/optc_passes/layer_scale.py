"""Fold multiplication by a constant per channel into the layer beside it.

LayerScale (Touvron et al. 2021, "Going deeper with Image Transformers", arXiv:2103.17239, section 2) multiplies each
residual branch by a learned vector; ConvNeXt does so across a permute.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from optc import Change, Pass, PassContext, PassResult, Program, Skip
from optc.rewrite import STRIDES_READ, calls, constant_of, dtype, erase_unused, module_path, shape, strides_read
from optc_passes.affine import fold_beside, hand_on

_MUL = torch.ops.aten.mul.Tensor


class FoldLayerScale(Pass):
    """Fold ``x·γ``, with γ a constant per channel or a number, into the layer before, or else into all layers after."""

    name = "fold-layer-scale"
    summary = "Fold multiplication by a constant per channel into the layer beside it."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied: list[Change] = []
        skipped: list[Skip] = []
        strided = strides_read(program)
        for node in calls(program, _MUL):
            factor = _factor(program, node)
            if factor is None:
                continue
            done, what = (False, STRIDES_READ) if node in strided else _fold(program, node, *factor)
            if done:
                applied.append(Change(self.name, node.name, what))
            else:
                skipped.append(Skip(self.name, node.name, what))
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))


def _factor(program: Program, node: fx.Node) -> tuple[fx.Node, Tensor | float] | None:
    """What a ``mul`` multiplies, and the constant; ``None`` if there is no constant or it changes shape or type.

    A tensor without dimensions has no channels.
    """
    for value, factor in (node.args[:2], node.args[1::-1]):
        if not isinstance(value, fx.Node) or constant_of(program, value) is not None:
            continue
        if not isinstance(value.meta["val"], Tensor):  # a size
            continue
        tensor = constant_of(program, factor)
        constant = tensor.detach() if tensor is not None else factor
        if not isinstance(constant, (Tensor, int, float)):
            continue
        same = () != shape(value) == shape(node) and dtype(value) == dtype(node)
        return (value, constant) if same and dtype(value).is_floating_point else None
    return None


def _fold(program: Program, node: fx.Node, value: fx.Node, factor: Tensor | float) -> tuple[bool, str]:
    rank = len(shape(value))
    if not isinstance(factor, Tensor):
        axes, factor = list(range(rank - 1, -1, -1)), torch.tensor(factor, dtype=torch.float64)
    else:
        padded = [1] * (rank - factor.ndim) + list(factor.shape)
        axes = [axis for axis in range(rank) if padded[axis] != 1]
        if len(axes) > 1:
            return False, f"its factor varies along {len(axes)} dimensions, not one"
        axes = axes or list(range(rank - 1, -1, -1))
    reasons = []
    for axis in axes:
        scale = factor.double().flatten().expand(shape(value)[axis])
        done, what = fold_beside(program, node, value, node, axis, scale, None)
        if done:
            hand_on(value, node)
            constants = node.args
            program.graph.erase_node(node)
            erase_unused(constants)
            return True, f"{module_path(node)} {what}".strip()
        reasons.append(what)
    return False, reasons[0]
