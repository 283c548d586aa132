"""Attention in the form of which OpenVINO makes one kernel, and the layers that compute its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from optc_openvino.graph import constant, part, quantization
from optc_openvino.runtime import ov

_PARTS_FIRST = [2, 0, 3, 1, 4]
"""From (batch, tokens, parts, heads, width) to (parts, batch, heads, tokens, width)."""


@dataclass(frozen=True)
class _Projection:
    """A layer whose output is taken apart.

    Attributes:
        layer: the product with the weights.
        bias: what is added to it, of one dimension; ``None`` if nothing.
        heads: of each part.
        width: of each head.
        parts: those that are used, by number: (batch, heads, tokens, width).
    """

    layer: ov.Node
    bias: ov.Output | None
    heads: int
    width: int
    parts: dict[int, ov.Output]


def split_projections(model: ov.Model) -> int:
    """Compute, in place, query, key and value by a layer each where one layer computes all three; returns how many.

    The parts of one layer's output are told apart by a transposition of five dimensions, which OpenVINO runs by itself,
    and so it does their quantization. As (batch, tokens, heads, width), from layers of their own, its attention kernel
    takes them as they are, and the layer quantizes. Weights of two elements a byte are left alone.
    """
    found = 0
    for node in model.get_ordered_ops():
        projection = _projection(node)
        if projection is not None:
            for number, output in projection.parts.items():
                _compute_alone(projection, number, output)
            found += 1
    model.validate_nodes_and_infer_types()
    return found


def spell_out_attention(model: ov.Model) -> int:
    """Write, in place, attention without a mask as products and a softmax; returns how many.

    OpenVINO does that too, but transposes quantized keys for the first product in a kernel of its own, where a product
    with a transposed operand leaves that to the attention kernel.
    """
    found, ops = 0, ov.opset13
    for node in model.get_ordered_ops():
        if node.get_type_name() != "ScaledDotProductAttention" or not _is_plain(node):
            continue
        query, key, value = (node.input_value(index) for index in range(3))
        width = query.get_partial_shape()[3].get_length()
        scores = ops.multiply(ops.matmul(query, key, False, True), ops.constant(width**-0.5, query.get_element_type()))
        attended = ops.matmul(ops.softmax(scores, -1), value, False, False)
        attended.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(attended.output(0))
        found += 1
    return found


def _is_plain(node: ov.Node) -> bool:
    """Whether an attention over (batch, heads, tokens, width) has no mask, and the usual scale."""
    shapes = [list(node.get_input_partial_shape(index)) for index in range(3)]
    if any(len(shape) != 4 or shape[1] != shapes[0][1] for shape in shapes) or shapes[0][3].is_dynamic:
        return False
    mask = constant(node.input_value(3)) if node.get_input_size() == 4 else None
    unmasked = node.get_input_size() == 3 or (mask is not None and not mask.get_data().any())
    return unmasked and not node.get_attributes()["causal"]


def _projection(transpose: ov.Node) -> _Projection | None:
    """What a transposition takes apart; ``None`` where it is of anything else, or the weights cannot be."""
    order = constant(transpose.input_value(1)) if transpose.get_type_name() == "Transpose" else None
    view = transpose.input_value(0).get_node() if order is not None and order.data.tolist() == _PARTS_FIRST else None
    if view is None or view.get_type_name() != "Reshape":
        return None
    layer, bias = view.input_value(0).get_node(), None
    if layer.get_type_name() == "Add":
        bias, layer = layer.input_value(1), layer.input_value(0).get_node()
    operands = [layer.input_value(1)] if layer.get_type_name() == "MatMul" else []
    if not operands or (bias is not None and len(bias.get_partial_shape()) != 1):
        return None
    whole, shape = list(layer.get_output_partial_shape(0)), list(view.get_output_partial_shape(0))
    if len(whole) != 3 or whole[1] != shape[1] or any(size.is_dynamic for size in shape[1:]):
        return None
    readers = [target.get_node() for target in transpose.output(0).get_target_inputs()]
    parts = dict(filter(None, map(_taken, readers)))
    if len(parts) != len(readers) or not all(map(_can_be_cut, [*operands, *([] if bias is None else [bias])])):
        return None
    return _Projection(layer, bias, shape[3].get_length(), shape[4].get_length(), parts)


def _taken(node: ov.Node) -> tuple[int, ov.Output] | None:
    """Which part of its operand a node takes, and that part without the dimension; ``None`` if it does not do that."""
    shape = list(node.get_output_partial_shape(0))
    start = constant(node.input_value(1)) if node.get_type_name() == "Slice" and shape[0] == 1 else None
    readers = [target.get_node() for target in node.output(0).get_target_inputs()]
    if start is None or len(readers) != 1 or list(readers[0].get_output_partial_shape(0)) != shape[1:]:
        return None
    return int(start.data.item()), readers[0].output(0)


def _compute_alone(projection: _Projection, number: int, output: ov.Output) -> None:
    """Compute a part of a projection by a layer of its own, with its part of the weights."""
    ops, size = ov.opset13, projection.heads * projection.width
    transposed = [projection.layer.get_attributes()[f"transpose_{operand}"] for operand in "ab"]
    weights = _cut(projection.layer.input_value(1), -2 if transposed[1] else -1, number, size)
    layer = ops.matmul(projection.layer.input_value(0), weights, *transposed)
    layer.set_friendly_name(part(projection.layer.get_friendly_name(), number))
    value = layer.output(0)
    if projection.bias is not None:
        value = ops.add(value, _cut(projection.bias, -1, number, size)).output(0)
    rounding = quantization(output)
    readers = (rounding[-1].output(0) if rounding else output).get_target_inputs()
    if rounding:  # with one scale for all, so it may as well come first
        rounding[0].input(0).replace_source_output(value)
        value = rounding[-1].output(0)
    heads = ops.reshape(value, ops.constant(np.array([0, 0, projection.heads, projection.width], np.int64)), True)
    heads_first = ops.transpose(heads, ops.constant(np.array([0, 2, 1, 3], np.int64))).output(0)
    for reader in readers:
        reader.replace_source_output(heads_first)


def _can_be_cut(value: ov.Output) -> bool:
    """Whether :func:`_cut` can take a part of a value."""
    node, kind = value.get_node(), value.get_node().get_type_name()
    if kind in ("Constant", "Reshape"):
        source = constant(value)
        if source is None or source.get_element_type() != value.get_element_type():
            return False
        return bool(source.data.size == math.prod(value.get_shape()))
    return kind in ("Convert", "Multiply", "Subtract") and all(map(_can_be_cut, node.input_values()))


def _cut(value: ov.Output, axis: int, number: int, size: int) -> ov.Output:
    """Part of a constant, or of what is computed from constants, along an axis counted from the end."""
    node, shape = value.get_node(), list(value.get_shape())
    if len(shape) < -axis or shape[axis] == 1:
        return value
    if node.get_type_name() in ("Constant", "Reshape"):
        source = constant(value)
        assert source is not None
        data = np.take(source.data.reshape(shape), range(number * size, (number + 1) * size), axis)
        # The type is given, as NumPy has bfloat16 as float16.
        tensor = ov.Tensor(data, ov.Shape(list(data.shape)), value.get_element_type())
        cut = ov.op.Constant(tensor, shared_memory=False)
        cut.set_friendly_name(part(source.get_friendly_name(), number))
        return cut.output(0)
    operands = [_cut(each, axis, number, size) for each in node.input_values()]
    if node.get_type_name() == "Convert":
        return ov.opset13.convert(operands[0], value.get_element_type()).output(0)
    arithmetic = {"Multiply": ov.opset13.multiply, "Subtract": ov.opset13.subtract}[node.get_type_name()]
    return arithmetic(*operands).output(0)
