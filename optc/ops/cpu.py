"""Fused CPU kernels of the composite operators: oneDNN's convolution and inner product with post-operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from optc.ops.composites import ACTIVATIONS, COMPOSITES, Composite, pair, register_kernel

mkldnn = torch.ops.mkldnn


def refusal(composite: Composite, args: tuple[Any, ...], packed: bool = False) -> str | None:
    """Why oneDNN cannot run this call (the decomposition then does), or ``None`` if it can.

    Args:
        args: all arguments of the composite; tensors may be fake.
        packed: whether the weight will be in oneDNN's own layout, which makes the convolution channels-last.
    """
    (x, weight, bias, *geometry), other = composite.split(args)
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "this PyTorch has oneDNN missing or turned off"
    reason = dtype_refusal(weight.dtype)
    if reason:
        return reason
    if any(tensor is not None and tensor.dtype != weight.dtype for tensor in (x, bias, other)):
        return "its operands differ in dtype"
    if composite.is_conv and x.dim() != 4:
        return "its input has no batch dimension"
    if any(size == 0 for size in (*x.shape, *weight.shape)):
        return "an operand is empty"
    # oneDNN reads a strided bias as if it were dense, and torch's wrapper does not check.
    if not (is_dense(weight) and (bias is None or bias.is_contiguous())):
        return "its weight or bias is not stored densely"
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):  # oneDNN ignores a single number
        return "its bias is not one number per output channel"
    if other is not None and tuple(other.shape) != composite.output_shape(args):
        return "the added operand is broadcast"
    if composite.is_conv and _window_in_padding(x, weight, *geometry[1:3]):
        return "some of its windows lie wholly in the padding, where oneDNN's kernels crash"
    if other is not None and composite.is_conv:
        # Here torch's wrapper itself computes one after the other, with an add_relu that knows float32 only.
        if geometry[-1] != 1:
            return "oneDNN adds nothing to a grouped convolution"
        if not (packed or _channels_last(x) or _channels_last(weight)):
            return "oneDNN adds only to a channels-last convolution"
    return None


def _window_in_padding(x: Tensor, weight: Tensor, padding: Any, dilation: Any) -> bool:
    """Whether an output element may read padding only (of use to no model, but allowed).

    With a bias or another post-operation, a stride and channels-last operands oneDNN 3.12 on AVX-512 then now and then
    reads or writes beyond its buffers, in ``torch.conv2d`` as well. A window misses the input on one side if the
    padding is as wide as the kernel, or in its middle if the dilation is wider than the input.
    """
    sizes = zip(x.shape[2:], weight.shape[2:], pair(padding), pair(dilation), strict=True)
    return any(p > 0 and (p > d * (kernel - 1) or d > size) for size, kernel, p, d in sizes)


def _channels_last(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def dtype_refusal(dtype: torch.dtype) -> str | None:
    """Why oneDNN has no kernel for ``dtype`` on this CPU, or ``None`` if it has."""
    if dtype is torch.float32:
        return None
    if dtype is torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported():
        return None
    if dtype is torch.float16 and mkldnn._is_mkldnn_fp16_supported():
        return None
    return f"oneDNN has no {str(dtype).removeprefix('torch.')} kernel on this CPU"


def is_dense(weight: Tensor) -> bool:
    """Whether a weight's elements lie without gaps, in the usual or the channels-last order."""
    return weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def fused_call(composite: Composite, args: tuple[Any, ...]) -> tuple[OpOverload, tuple[Any, ...]]:
    """The ``mkldnn`` operator and arguments that compute a composite call in one oneDNN primitive.

    oneDNN's relu, relu6 and hardsigmoid give a number where their input is NaN; torch's give NaN.

    Args:
        args: all arguments of the composite: tensors, or what stands for them in a graph.
    """
    (x, weight, bias, *geometry), other = composite.split(args)
    post: tuple[str | None, list[float], str | None] = (None, [], None) if composite.residual else ("none", [], "")
    if composite.activation:
        activation = ACTIVATIONS[composite.activation]
        post = (activation.onednn, list(activation.args), activation.onednn_algorithm)
    if not composite.is_conv:
        if composite.residual:
            return mkldnn._linear_pointwise.binary, (x, other, weight, bias, "add")
        return mkldnn._linear_pointwise.default, (x, weight, bias, *post)
    stride, padding, dilation, groups = geometry
    layout = (pair(padding), pair(stride), pair(dilation), groups)
    if composite.residual:
        return mkldnn._convolution_pointwise.binary, (x, other, weight, bias, *layout, "add", 1.0, *post)
    return mkldnn._convolution_pointwise.default, (x, weight, bias, *layout, *post)


def _kernel(composite: Composite) -> Callable[..., Tensor]:
    def run(*args: Any) -> Tensor:
        args = composite.complete(args)
        if refusal(composite, args):
            return composite.decomposition(*args)
        target, arguments = fused_call(composite, args)
        result: Tensor = target(*arguments)
        return result

    return run


def register() -> None:
    """Register the fused kernel of every composite for CPU tensors."""
    for composite in COMPOSITES.values():
        register_kernel(composite.name, "CPU", _kernel(composite))
