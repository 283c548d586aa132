"""Rounding that lets later weights make up for the errors of earlier ones.

Frantar, Ashkboos, Hoefler and Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", ICLR 2023 (arXiv:2210.17323). torchao 0.18 has an implementation, but its 4-bit form needs CUDA kernels
and wraps modules, which a captured graph no longer has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optc_passes.quant_scale import best_scale

if TYPE_CHECKING:
    from optc_passes.quant_blocks import BlockFormat

_DAMPING = (0.01, 0.1, 1.0)
"""Share of the mean diagonal added to the Hessian: as in the paper, then more where float32 cannot invert it so."""


def enough_samples(inputs: Tensor) -> bool:
    """Whether there are at least as many samples as input features, so that the Hessian has full rank."""
    return inputs.numel() // inputs.shape[-1] >= inputs.shape[-1]


def round_gptq(weight: Tensor, inputs: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Round a weight column by column; each column's error is spread over those that follow, by the inverse Hessian.

    Args:
        weight: (outputs, features), float.
        inputs: (…, features), what the layer reads in calibration; see :func:`enough_samples`.

    Returns:
        int8 (outputs, features) within the format's limits, and float32 scales (outputs, features / block).
    """
    block = form.block_of(weight.shape[1])
    assert block is not None, "callers check refusal()"
    low, high = form.limits
    rest = weight.detach().float().clone()
    factor = _inverse_factor(inputs.detach().float().reshape(-1, weight.shape[1]))
    integers = torch.empty_like(rest, dtype=torch.int8)
    scales = []
    for start in range(0, rest.shape[1], block):
        end = start + block
        part, local = rest[:, start:end], factor[start:end, start:end]
        scale = best_scale(part.unsqueeze(1), form.limits).squeeze(-1)
        errors = torch.empty_like(part)
        for column in range(block):
            rounded = (part[:, column] / scale[:, 0]).round().clamp(low, high)
            integers[:, start + column] = rounded.to(torch.int8)
            error = (part[:, column] - rounded * scale[:, 0]) / local[column, column]
            part[:, column + 1 :] -= error.outer(local[column, column + 1 :])
            errors[:, column] = error
        rest[:, end:] -= errors @ factor[start:end, end:]
        scales.append(scale)
    return integers, torch.cat(scales, 1)


def _inverse_factor(inputs: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of XᵀX; features never seen get a diagonal of their own."""
    hessian = inputs.T @ inputs
    diagonal = hessian.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    for damping in _DAMPING:
        diagonal.add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        factor, failed_again = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not (failed or failed_again):
            break
    upper: Tensor = factor
    return upper
