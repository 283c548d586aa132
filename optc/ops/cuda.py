"""Fused CUDA kernels of the composite operators: cuDNN's convolution with bias, residual and relu."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from optc.ops.composites import COMPOSITES, Composite, pair, register_kernel

_TYPES = (torch.float32, torch.float16)


def refusal(composite: Composite, args: tuple[Any, ...]) -> str | None:
    """Why cuDNN's fused convolution cannot run this call (the decomposition then does), or ``None`` if it can.

    Args:
        args: all arguments of the composite.
    """
    (x, weight, bias, *geometry), other = composite.split(args)
    if not (torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled):
        return "this PyTorch has cuDNN missing or turned off"
    if weight.dtype not in _TYPES:
        return f"cuDNN's fused convolution is not used for {str(weight.dtype).removeprefix('torch.')}"
    if any(tensor is not None and tensor.dtype != weight.dtype for tensor in (x, bias, other)):
        return "its operands differ in dtype"
    if x.dim() != 4 or any(size == 0 for size in (*x.shape, *weight.shape)):
        return "its input has no batch dimension or is empty"
    if geometry[-1] != 1:
        return "it is a grouped convolution"
    if bias is not None and not bias.is_contiguous():
        return "its bias is not stored densely"
    if other is not None and tuple(other.shape) != composite.output_shape(args):
        return "the added operand is broadcast"
    return None


def why_decomposed(composite: Composite, args: tuple[Any, ...]) -> str | None:
    """Why a call runs its decomposition on CUDA, or ``None`` if it has a fused kernel there."""
    if not _is_fused(composite):
        return f"cuDNN has no fused kernel for {composite.name}"
    return refusal(composite, args)


def _is_fused(composite: Composite) -> bool:
    return composite.is_conv and composite.activation == "relu"


def _kernel(composite: Composite) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        args = composite.complete(args)
        if refusal(composite, args):
            return composite.decomposition(*args)
        (x, weight, bias, stride, padding, dilation, groups), other = composite.split(args)
        geometry = pair(stride), pair(padding), pair(dilation), groups
        if composite.residual:
            return torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *geometry)
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)

    return run


def register() -> None:
    """Register the fused kernel of the convolutions cuDNN has one for, those ending in relu, for CUDA tensors."""
    for composite in COMPOSITES.values():
        if _is_fused(composite):
            register_kernel(composite.name, "CUDA", _kernel(composite))
