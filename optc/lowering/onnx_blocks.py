"""Weights stored as blocks of small integers: their ONNX form, in the shape that runtimes turn into one kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from onnxscript import opset23 as op

_INT4_MAX = 7
_VIEWS = ("Flatten", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")


def _dequantize(
    integers: Any,
    scales: Any,
    zero_points: Any,
    quant_min: int,
    quant_max: int,
    dtype: int,
    group_size: int,
    output_dtype: int,
) -> Any:
    """DequantizeLinear with blocks along the last dimension (opset 21), of 4-bit integers where they fit."""
    if quant_max <= _INT4_MAX:
        integers = op.Cast(integers, to=ir.DataType.INT4)
    return op.DequantizeLinear(integers, scales, axis=1, block_size=group_size)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.quantized_decomposed.dequantize_per_channel_group.default: _dequantize
}
"""For torch.onnx: the operators of this file, which it does not know."""


def tidy_blocks(model: ir.Model) -> None:
    """Store 4-bit weights as such, and write each product with blocks as ``MatMul(x, DequantizeLinear(weight))``.

    onnxruntime makes one MatMulNBits of that, and of nothing else: not of a Gemm, nor of a transposed weight.
    """
    for node in list(model.graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.INT4:
            ir.convenience.replace_all_uses_with(node.outputs[0], _as_int4(model, node.inputs[0]))
            model.graph.remove(node, safe=True)
    for node in list(model.graph):
        if node.op_type == "Gemm" and is_blocked(_producer(node.inputs[1])):
            gemm_to_matmul(model, node)
    for node in list(model.graph):
        if node.op_type == "MatMul" and _multiplies_blocks(node) and _is_dequantized(node.inputs[0]):
            _part_from_dequantize(model, node)
        if node.op_type == "Relu" and _multiplies_blocks(_producer(node.inputs[0])):
            _relu_to_max(model, node)


def is_blocked(node: ir.Node | None) -> bool:
    """Whether a node dequantizes blocks."""
    return node is not None and node.op_type == "DequantizeLinear" and "block_size" in node.attributes


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _as_int4(model: ir.Model, weight: ir.Value | None) -> ir.Value:
    """The int8 initializer as one of 4-bit integers."""
    tensor = None if weight is None else weight.const_value
    assert tensor is not None, "passes write the integers as constants"
    assert weight is not None
    name = f"{weight.name}.int4"
    lazy = ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy().astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4, name=name),
        dtype=ir.DataType.INT4,
        shape=ir.Shape(tensor.numpy().shape),
        name=name,
    )
    return register(model, name, lazy)


def gemm_to_matmul(model: ir.Model, gemm: ir.Node, add: str = "Add") -> None:
    """``Gemm(x, weight, bias)`` as ``Add(MatMul(x, Transpose(weight)), bias)``; the transpose is folded later.

    Args:
        add: the operator that adds the bias.
    """
    x, weight, *bias = gemm.inputs
    transposed = ir.Node("", "Transpose", [weight], [ir.AttrInt64s("perm", [1, 0])])
    product = ir.Node("", "MatMul", [x, transposed.outputs[0]], name=gemm.name)
    new = [transposed, product]
    if bias and bias[0] is not None:
        new.append(ir.Node("", add, [product.outputs[0], bias[0]]))
    ir.convenience.replace_nodes_and_values(model.graph, gemm, [gemm], new, gemm.outputs, new[-1].outputs)


def _multiplies_blocks(node: ir.Node | None) -> bool:
    """Whether a node is a product with blocks, or adds the bias to one."""
    if node is not None and node.op_type == "Add":
        node = _producer(node.inputs[0])
    if node is None or node.op_type != "MatMul":
        return False
    weight = _producer(node.inputs[1])
    return is_blocked(_producer(weight.inputs[0]) if weight is not None and weight.op_type == "Transpose" else weight)


def _is_dequantized(value: ir.Value | None) -> bool:
    """Whether a value is a DequantizeLinear's, or a choice or view of one."""
    node = _producer(value)
    while node is not None and node.op_type in _VIEWS:
        node = _producer(node.inputs[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _part_from_dequantize(model: ir.Model, product: ir.Node) -> None:
    """``Max(x, -inf)`` in front of a product with blocks: onnxruntime takes one of two dequantized operands for another
    pattern, and runs it in float.
    """
    x = product.inputs[0]
    lowest = register(model, "no_floor", ir.tensor(float("-inf"), dtype=ir.DataType.FLOAT))
    same = ir.Node("", "Max", [x, lowest])
    same.outputs[0].dtype = ir.DataType.FLOAT
    model.graph.insert_before(product, same)
    product.replace_input_with(0, same.outputs[0])


def _relu_to_max(model: ir.Model, relu: ir.Node) -> None:
    """``Max(x, 0)``, which is the same: a Relu or Clip behind the product keeps onnxruntime from looking for blocks."""
    zero = register(model, "relu_floor", ir.tensor(0.0, dtype=ir.DataType.FLOAT))
    new = ir.Node("", "Max", [relu.inputs[0], zero], name=relu.name)
    ir.convenience.replace_nodes_and_values(model.graph, relu, [relu], [new], relu.outputs, new.outputs)


def register(model: ir.Model, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """An initializer of that name over ``tensor``; the one that is there already if there is one."""
    if name not in model.graph.initializers:
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        model.graph.register_initializer(value)
    return model.graph.initializers[name]
