"""Weights of linear layers as blocks of small integers, one scale a block; activations stay in float."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from optc import Change, Program
from optc.rewrite import add_constant, argument, erase_unused, set_argument
from optc_passes.quant_gptq import enough_samples, round_gptq
from optc_passes.quant_plan import LINEARS
from optc_passes.quant_scale import best_scale

DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_channel_group.default
_CHUNK = 1 << 20
"""Weights rounded at a time, as temporary copies of all would take several times their memory."""


Rounded = tuple[Tensor, ...]
"""What is stored of a weight: integers and scales, or the weight in another type."""
Size = tuple[int, ...]


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

    def refusal(self, node: fx.Node, weight: Tensor) -> str | None:
        """Why a layer cannot have the format, or ``None``."""
        if node.target not in LINEARS:
            return "runtimes have block-wise weights for matrix products only"
        if self.block_of(weight.shape[-1]) is None:
            return f"its {weight.shape[-1]} inputs do not divide into blocks of 32 or more"
        return None

    def rounded(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Integers and scales of a weight; 4 bits are rounded by GPTQ where the input ``x`` has samples enough."""
        if self.bits < 8 and enough_samples(x):
            return round_gptq(weight, x, self)
        return round_blocks(weight, self)

    def effect(self, x: Tensor, weight: Tensor, rounded: Rounded) -> tuple[Tensor, Tensor]:
        """Input and weight as the layer sees them."""
        return x, dequantized(*rounded)

    def store(self, program: Program, node: fx.Node, rounded: Rounded) -> Change:
        """Replace a layer's weight by integers, scales and a dequantize operator; in place."""
        old = argument(node, "weight")
        integers, scales = rounded
        hint = str(old.target)
        stored = add_constant(program, node, f"{hint}_int{self.bits}", integers)
        scale = add_constant(program, node, f"{hint}_scale", scales)
        block = integers.shape[1] // scales.shape[1]
        with node.graph.inserting_before(node):
            args = (stored, scale, None, *self.limits, torch.int8, block, torch.float32)
            weight = node.graph.call_function(DEQUANTIZE, args)
        weight.meta.update({key: old.meta[key] for key in ("val", "dims") if key in old.meta})
        set_argument(node, "weight", weight)
        erase_unused((old,))
        return Change(self.name, node.name, f"{hint} in blocks of {block}")

    def stored_bytes(self, weight: Size) -> int:
        """Bytes of a weight of that shape, with scales."""
        block = self.block_of(weight[-1])
        assert block is not None, "callers check refusal()"
        return math.prod(weight) * self.bits // 8 + 4 * math.prod(weight) // block

    def block_of(self, width: int) -> int | None:
        """Values a scale for an input dimension of ``width``; ``None`` if no block divides it."""
        block = self.block
        while block >= 32:
            if width % block == 0:
                return block
            block //= 2
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


def _round(blocks: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Integers (rows, blocks, values) and scales (rows, blocks)."""
    scale = best_scale(blocks, form.limits)
    return (blocks / scale).round_().clamp_(*form.limits).to(torch.int8), scale.squeeze(-1)
