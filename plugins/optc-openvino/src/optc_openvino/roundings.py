"""Roundings in the graph that ONNX Runtime needs and OpenVINO does not."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import fx

from optc import Program
from optc.rewrite import argument, calls, is_call

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
_ACTIVATIONS = (
    aten.elu.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.mish.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.tanh.default,
)


def without_roundings_before_activations(program: Program) -> tuple[Program, int]:
    """A program without the quantizations and dequantizations that only activations in float read, and how many.

    ONNX Runtime has int8 kernels only for layers whose output is quantized, so the graph rounds it even where an
    activation in float comes next. OpenVINO's int8 layers have float outputs, to which it fuses the activation and
    the quantization after it. Between the two another one is a kernel of its own, and noise.

    Returns:
        The program itself if there are none.
    """
    if not any(_needless(node) for node in calls(program, decomposed.dequantize_per_tensor.default)):
        return program, 0
    rewritten = program.fork()
    found = [node for node in calls(rewritten, decomposed.dequantize_per_tensor.default) if _needless(node)]
    for node in found:
        quantize = argument(node, "input")
        node.replace_all_uses_with(argument(quantize, "input"))
        rewritten.graph.erase_node(node)
        if not quantize.users:
            rewritten.graph.erase_node(quantize)
    rewritten.module.recompile()
    return rewritten, len(found)


def _needless(dequantize: fx.Node) -> bool:
    """Whether a value is rounded right before it is dequantized, and only activations read it."""
    return is_call(argument(dequantize, "input"), decomposed.quantize_per_tensor.default) and all(
        _is_activation(reader, dequantize) for reader in dequantize.users
    )


def _is_activation(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node is an activation, or the product of ``value`` and its sigmoid, which is one."""
    if is_call(node, aten.mul.Tensor):
        return any(is_call(each, *_ACTIVATIONS) and each.args[0] is value for each in node.all_input_nodes)
    return is_call(node, *_ACTIVATIONS)
