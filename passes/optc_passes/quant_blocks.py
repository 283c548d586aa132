"""Weights of linear layers as blocks of small integers, one scale a block; activations stay in float."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from optc import Change, Program
from optc.rewrite import add_constant, argument, constant_of, erase_unused, set_argument
from optc_passes.quant_plan import LINEARS

DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_channel_group.default
_CLIPPINGS = torch.linspace(1.0, 0.7, 7)
"""Shares of a block's largest magnitude that are tried as the end of its range."""
_CHUNK = 1 << 20
"""Weights rounded at a time, as temporary copies of all would take several times their memory."""


@dataclass(frozen=True)
class BlockFormat:
    """Symmetric integers of ``bits`` bits, a scale for every ``block`` values along the input dimension at most.

    Attributes:
        block: values a scale; halved, down to 32, until it divides a layer's input dimension.
    """

    bits: int
    block: int = 128

    @property
    def name(self) -> str:
        """Such as ``int4-weights``."""
        return f"int{self.bits}-weights"

    @property
    def limits(self) -> tuple[int, int]:
        """Least and largest integer."""
        return -(1 << self.bits - 1), (1 << self.bits - 1) - 1

    def block_of(self, width: int) -> int | None:
        """Values a scale for an input dimension of ``width``; ``None`` if no block divides it."""
        block = self.block
        while block >= 32:
            if width % block == 0:
                return block
            block //= 2
        return None


def refusal(node: fx.Node, form: BlockFormat) -> str | None:
    """Why a layer cannot have block-wise weights, or ``None``."""
    if node.target not in LINEARS:
        return "runtimes have block-wise weights for matrix products only"
    width = int(argument(node, "weight").meta["val"].shape[-1])
    if form.block_of(width) is None:
        return f"its {width} inputs do not divide into blocks of 32 or more"
    return None


def round_blocks(weight: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Round a weight block by block, each block's scale being the one of least squared error among 7 clippings.

    Args:
        weight: (outputs, inputs), float.

    Returns:
        int8 (outputs, inputs) within the format's limits, and float32 scales (outputs, inputs / block).
    """
    block = form.block_of(weight.shape[1])
    assert block is not None, "callers check refusal()"
    rows = max(1, _CHUNK // weight.shape[1])
    parts = [_round(part.float().reshape(len(part), -1, block), form) for part in weight.detach().split(rows)]
    rounded, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    return rounded.reshape(weight.shape), scales


def dequantized(integers: Tensor, scales: Tensor) -> Tensor:
    """The float32 weight that integers (outputs, inputs) and scales (outputs, blocks) stand for."""
    blocks = integers.float().reshape(*scales.shape, -1)
    return (blocks * scales.unsqueeze(-1)).reshape(integers.shape)


def best_scale(blocks: Tensor, form: BlockFormat) -> Tensor:
    """The scale of least squared error among 7 clippings of each block's range: (rows, blocks, 1).

    Args:
        blocks: (rows, blocks, values), float.
    """
    low, high = form.limits
    peak = blocks.abs().amax(-1, keepdim=True)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    best_error = torch.full_like(peak, torch.inf)
    best = peak / high
    for clipping in _CLIPPINGS.tolist() if form.bits < 8 else (1.0,):
        scale = peak * (clipping / high)
        error = ((blocks / scale).round_().clamp_(low, high).mul_(scale).sub_(blocks)).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best


def _round(blocks: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Integers (rows, blocks, values) and scales (rows, blocks)."""
    scale = best_scale(blocks, form)
    return (blocks / scale).round_().clamp_(*form.limits).to(torch.int8), scale.squeeze(-1)


def store_blocks(
    program: Program, node: fx.Node, form: BlockFormat, rounded_before: tuple[Tensor, Tensor] | None = None
) -> Change:
    """Replace a layer's weight by integers, scales and a dequantize operator; in place.

    Args:
        rounded_before: integers and scales, if the weight was rounded before.
    """
    old = argument(node, "weight")
    value = constant_of(program, old)
    assert value is not None, "callers plan layers with constant weights"
    rounded, scales = rounded_before or round_blocks(value, form)
    hint = str(old.target)
    integers = add_constant(program, node, f"{hint}_int{form.bits}", rounded)
    scale = add_constant(program, node, f"{hint}_scale", scales)
    block = rounded.shape[1] // scales.shape[1]
    with node.graph.inserting_before(node):
        args = (integers, scale, None, *form.limits, torch.int8, block, torch.float32)
        dequantized = node.graph.call_function(DEQUANTIZE, args)
    dequantized.meta.update({key: old.meta[key] for key in ("val", "dims") if key in old.meta})
    set_argument(node, "weight", dequantized)
    erase_unused((old,))
    return Change(form.name, node.name, f"{hint} in blocks of {block}")
