"""Bias correction: what rounding a weight adds to a layer's mean output is taken off its bias.

Nagel, van Baalen, Blankevoort and Welling, "Data-Free Quantization Through Weight Equalization and Bias Correction",
ICCV 2019 (arXiv:1906.04721), section 4.2, in its empirical form: the mean is taken over calibration data.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from optc import Program
from optc.rewrite import add_constant, argument, constant_of, erase_unused, set_argument
from optc_passes.quant_plan import CONVS


def mean_shift(node: fx.Node, x: Tensor, error: Tensor) -> Tensor:
    """By how much the mean of a layer's output, before bias and activation, moves: one number a channel.

    Args:
        node: a convolution or linear layer.
        x: its input, batch first.
        error: the rounded weight minus the weight.
    """
    if node.target in CONVS:
        geometry = [argument(node, name) for name in ("stride", "padding", "dilation", "groups")]
        return torch.mean(torch.ops.aten.conv2d.default(x, error, None, *geometry), (0, 2, 3))
    return torch.matmul(x.reshape(-1, x.shape[-1]).mean(0), error.T)


def correct_bias(program: Program, node: fx.Node, shift: Tensor) -> None:
    """Take ``shift`` (one number a channel) off a layer's bias; in place. A layer without one stays without."""
    old = argument(node, "bias")
    value = constant_of(program, old)
    if value is None:
        return
    new = add_constant(program, node, f"{old.target}_corrected", value - shift.to(value.dtype))
    new.meta.update({key: old.meta[key] for key in ("val", "dims") if key in old.meta})
    set_argument(node, "bias", new)
    erase_unused((old,))
