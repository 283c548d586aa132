"""The scale of a block of weights."""

from __future__ import annotations

import torch
from torch import Tensor

_CLIPPINGS = torch.linspace(1.0, 0.7, 7)
"""Shares of a block's largest magnitude that are tried as the end of its range."""


def best_scale(blocks: Tensor, limits: tuple[int, int]) -> Tensor:
    """The scale of least squared error among 7 clippings of each block's range: (rows, blocks, 1).

    Args:
        blocks: (rows, blocks, values), float.
        limits: least and largest integer; 8 bits are not clipped.
    """
    low, high = limits
    peak = blocks.abs().amax(-1, keepdim=True)
    peak = torch.where(peak > 0, peak, torch.ones_like(peak))
    best_error = torch.full_like(peak, torch.inf)
    best = peak / high
    for clipping in _CLIPPINGS.tolist() if high < 127 else (1.0,):
        scale = peak * (clipping / high)
        error = ((blocks / scale).round_().clamp_(low, high).mul_(scale).sub_(blocks)).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best)
    return best
