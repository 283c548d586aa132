"""Rewrites on the exported ONNX graph: what the exporter leaves to the runtime and costs memory or speed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from optc.lowering import onnx_blocks, onnx_dynamic
from optc.lowering.onnx_resize import keep_channels_first


def tidy(model: ir.Model) -> None:
    """Fold, clean and name, in place.

    Transposes of weights go first and lazily; what the optimizer then folds is small (shapes, scales), so no weight is
    ever copied. Metadata goes because it holds source paths of the machine the export ran on.
    """
    onnx_blocks.tidy_blocks(model)
    onnx_dynamic.tidy_dynamic(model)
    transpose_weights(model)
    optimize(model)
    dequantize_biases(model)
    keep_channels_first(model)  # the optimizer would drop what changes nothing
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)


def optimize(model: ir.Model) -> None:
    """onnxscript's optimizer, after which nodes still know what they were exported from.

    A node that it writes knows nothing; it stands for what computed its outputs before. Of several, such as a
    convolution and the batch norm merged into it, the one of its own type counts.
    """
    before = {value.name: node for node in model.graph for value in node.outputs}
    operands = {node: [value.name for value in node.inputs if value is not None] for node in before.values()}
    optimizer.optimize_ir(model)
    kept = {value.name for node in model.graph for value in node.outputs}
    for node in model.graph:
        if "node" in node.meta:
            continue
        found: list[ir.Node] = []
        names = [value.name for value in node.outputs]
        while names:
            old = before.get(names.pop())
            if old is not None and old not in found:
                found.append(old)
                names += [name for name in operands[old] if name not in kept]
        source = next((old for old in found if old.op_type == node.op_type), found[0] if found else None)
        if source is not None and "node" in source.meta:
            node.meta["node"] = source.meta["node"]


def transpose_weights(model: ir.Model) -> None:
    """Replace ``Transpose(weight)`` by a transposed weight, and ``Transpose(DequantizeLinear(weight))`` likewise.

    The exporter writes a linear layer on more than two dimensions as MatMul with its weight transposed. Folded by the
    runtime at load time, that would hold each weight twice. One that is an output of the model stays: an output has a
    node that makes it, and a name of its own.
    """
    for node in list(model.graph):
        if node.op_type != "Transpose" or node.domain != "" or node.outputs[0].is_graph_output():
            continue
        source, perm = node.inputs[0], node.attributes["perm"].as_ints()
        assert source is not None
        dequantize = source.producer()
        if source.const_value is not None and source.is_initializer():
            new = _transposed(model, source, perm)
        elif dequantize is not None and _dequantizes_weight(dequantize):
            new = _transposed_dequantize(model, dequantize, perm)
        else:
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], new)
        model.graph.remove(node, safe=True)


def _dequantizes_weight(node: ir.Node) -> bool:
    weight = node.inputs[0]
    return node.op_type == "DequantizeLinear" and weight is not None and weight.is_initializer()


def _transposed(model: ir.Model, weight: ir.Value, perm: tuple[int, ...] | list[int]) -> ir.Value:
    """An initializer that reads as ``weight`` transposed, computed each time it is asked for."""
    name = f"{weight.name}.T" if tuple(perm) == (1, 0) else f"{weight.name}.{''.join(map(str, perm))}"
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = weight.const_value
    assert tensor is not None
    shape = ir.Shape([tensor.numpy().shape[axis] for axis in perm])
    lazy = ir.LazyTensor(_transposer(tensor, tuple(perm), name), dtype=tensor.dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=lazy)
    model.graph.register_initializer(value)
    return value


def _transposer(tensor: ir.TensorProtocol, perm: tuple[int, ...], name: str) -> Callable[[], ir.Tensor[Any]]:
    def transpose() -> ir.Tensor[Any]:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().transpose(perm)), dtype=tensor.dtype, name=name)

    return transpose


def _transposed_dequantize(model: ir.Model, node: ir.Node, perm: tuple[int, ...] | list[int]) -> ir.Value:
    """A DequantizeLinear of the transposed weight, its channel axis moved along, and its scales where it has blocks."""
    weight, *parameters = node.inputs
    assert weight is not None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    attributes = [ir.AttrInt64("axis", list(perm).index(axis % len(perm)))]
    if onnx_blocks.is_blocked(node):
        attributes.append(node.attributes["block_size"])
        parameters = [_transposed(model, scales, perm) for scales in parameters if scales is not None]
    new = ir.Node(
        "", "DequantizeLinear", [_transposed(model, weight, perm), *parameters], attributes, name=f"{node.name}.T"
    )
    new.outputs[0].dtype = ir.DataType.FLOAT
    node.graph.insert_after(node, new)  # type: ignore[union-attr]
    return new.outputs[0]


def dequantize_biases(model: ir.Model) -> None:
    """Write int32 biases that a plain Add takes as float32, computing once what the runtime would at every call.

    Biases of Conv and Gemm stay integers: the integer kernels take them as they are.
    """
    for node in list(model.graph):
        if not _dequantizes_weight(node) or node.inputs[0].dtype != ir.DataType.INT32:  # type: ignore[union-attr]
            continue
        output = node.outputs[0]
        constants = [value.const_value if value is not None else None for value in node.inputs]
        if any(user.op_type != "Add" for user, _ in output.uses()) or output.is_graph_output() or None in constants:
            continue
        bias, scale, zero_point = (constant.numpy() for constant in constants if constant is not None)
        values = ((bias - zero_point).astype(np.float32) * scale).astype(np.float32)
        name = f"{output.name}.float"  # not the bias's: layers may share one and differ in scale
        value = ir.Value(
            name=name,
            shape=ir.Shape(values.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(values),
        )
        model.graph.register_initializer(value)
        ir.convenience.replace_all_uses_with(output, value)
        model.graph.remove(node, safe=True)
