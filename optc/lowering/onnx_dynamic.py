"""Activations quantized by the range that each call finds: their ONNX form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from onnxscript import opset23 as op

from optc.lowering.onnx_blocks import gemm_to_matmul

_decomposed = torch.ops.quantized_decomposed


def _choose(x: Any, quant_min: int, quant_max: int, eps: float, dtype: int) -> Any:
    _, scale, zero_point = op.DynamicQuantizeLinear(x)
    return scale, zero_point


def _quantize(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int) -> Any:
    return op.QuantizeLinear(x, scale, zero_point)


def _dequantize(
    x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, dtype: int, *, out_dtype: int | None = None
) -> Any:
    return op.DequantizeLinear(x, scale, zero_point)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    _decomposed.choose_qparams.tensor: _choose,
    _decomposed.quantize_per_tensor.tensor: _quantize,
    _decomposed.dequantize_per_tensor.tensor: _dequantize,
}
"""For torch.onnx: the operators of this file, which it does not know. All of it is uint8, as the passes write it."""


def tidy_dynamic(model: ir.Model) -> None:
    """Take the integers from DynamicQuantizeLinear itself, which has them, and not from a QuantizeLinear beside it.

    A Gemm that reads them becomes a MatMul, of which alone onnxruntime makes DynamicQuantizeMatMul, and Sum adds its
    bias: onnxruntime would make MatMul and Add a Gemm again before it looks for integers. What the exporter believes of
    DynamicQuantizeLinear's outputs, a double and an int64 of shape [1], is PyTorch's form of them.
    """
    for node in list(model.graph):
        if node.op_type == "DynamicQuantizeLinear":
            integers, scale, zero_point = node.outputs
            integers.dtype, scale.dtype, zero_point.dtype = ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8
            scale.shape = zero_point.shape = ir.Shape(())
    for node in list(model.graph):
        if node.op_type == "Gemm" and _chosen(_producer(node.inputs[0])) is not None:
            gemm_to_matmul(model, node, add="Sum")
    for node in list(model.graph):
        chosen = _chosen(node) if node.op_type == "QuantizeLinear" else None
        if chosen is not None and chosen.inputs[0] is node.inputs[0]:
            ir.convenience.replace_all_uses_with(node.outputs[0], chosen.outputs[0])
            model.graph.remove(node, safe=True)


def _chosen(node: ir.Node | None) -> ir.Node | None:
    """The DynamicQuantizeLinear that a quantization or dequantization has its scale from."""
    if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return None
    source = _producer(node.inputs[1])
    return source if source is not None and source.op_type == "DynamicQuantizeLinear" else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()
