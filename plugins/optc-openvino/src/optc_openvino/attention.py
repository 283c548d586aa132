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
        sum: where a bias is added to it; ``None`` if nowhere.
        heads: of each part.
        width: of each head.
        parts: those that are used, by number: (batch, heads, tokens, width).
    """

    layer: ov.Node
    sum: ov.Node | None
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
    zeros = mask is not None and mask.get_element_type().is_real() and not mask.get_data().any()
    return (zeros or node.get_input_size() == 3) and not node.get_attributes()["causal"]


def _projection(transpose: ov.Node) -> _Projection | None:
    """What a transposition takes apart; ``None`` where it is of anything else, or the weights cannot be."""
    order = constant(transpose.input_value(1)) if transpose.get_type_name() == "Transpose" else None
    if order is None or order.data.tolist() != _PARTS_FIRST:
        return None
    view = transpose.input_value(0).get_node()
    last = view.input_value(0).get_node() if view.get_type_name() == "Reshape" else view
    layer = last.input_value(0).get_node() if last.get_type_name() == "Add" else last
    if layer.get_type_name() != "MatMul" or any(_fans_out(node) for node in (view, last, layer)):
        return None
    bias = [last.input_value(1)] if last.get_type_name() == "Add" else []
    if not all(map(_can_be_cut, [layer.input_value(1), *bias])) or any(len(each.get_shape()) != 1 for each in bias):
        return None
    whole, shape = list(last.get_output_partial_shape(0)), list(view.get_output_partial_shape(0))
    if len(whole) != 3 or any(size.is_dynamic for size in [*whole[1:], *shape[1:]]):
        return None
    tokens, count, heads, width = (size.get_length() for size in shape[1:])
    if [size.get_length() for size in whole[1:]] != [tokens, count * heads * width]:
        return None
    readers = [target.get_node() for target in transpose.output(0).get_target_inputs()]
    parts = dict(filter(None, map(_taken, readers)))
    if len(parts) != len(readers) or not all(0 <= number < count for number in parts):
        return None
    return _Projection(layer, last if bias else None, heads, width, parts)


def _fans_out(node: ov.Node) -> bool:
    return len(node.output(0).get_target_inputs()) > 1


def _taken(node: ov.Node) -> tuple[int, ov.Output] | None:
    """Which part of its operand a node takes, and that part without the dimension; ``None`` if it does not do that."""
    kind, places = node.get_type_name(), {"Slice": (1, 4), "Gather": (1, 2)}
    if node.get_input_size() <= max(places.get(kind, (99,))):
        return None
    found = [constant(node.input_value(index)) for index in places[kind]]
    start, axis = (None if each is None or each.data.size != 1 else int(each.data.item()) for each in found)
    if start is None or axis != 0:
        return None
    shape = list(node.get_output_partial_shape(0))
    if kind == "Gather":
        return (start, node.output(0)) if len(shape) == 4 else None
    readers = [target.get_node() for target in node.output(0).get_target_inputs()]
    if shape[0] != 1 or len(readers) != 1 or list(readers[0].get_output_partial_shape(0)) != shape[1:]:
        return None
    return start, readers[0].output(0)


def _compute_alone(projection: _Projection, number: int, output: ov.Output) -> None:
    """Compute a part of a projection by a layer of its own, with its part of the weights."""
    ops, size = ov.opset13, projection.heads * projection.width
    transposed = [projection.layer.get_attributes()[f"transpose_{operand}"] for operand in "ab"]
    weights = _cut(projection.layer.input_value(1), -2 if transposed[1] else -1, number, size)
    value = ops.matmul(projection.layer.input_value(0), weights, *transposed)
    value.set_friendly_name(part(projection.layer.get_friendly_name(), number))
    if projection.sum is not None:
        value = ops.add(value, _cut(projection.sum.input_value(1), -1, number, size))
        value.set_friendly_name(part(projection.sum.get_friendly_name(), number))
    for node in quantization(output):  # with one scale for all, so it may as well come first
        value = _anew(node, [value.output(0), *node.input_values()[1:]])
        value.set_friendly_name(node.get_friendly_name())
        output = node.output(0)
    heads = ops.reshape(value, ops.constant(np.array([0, 0, projection.heads, projection.width], np.int64)), True)
    output.replace(ops.transpose(heads, ops.constant(np.array([0, 2, 1, 3], np.int64))).output(0))


def _anew(node: ov.Node, operands: list[ov.Output]) -> ov.Node:
    """A node that does with other operands what a node does."""
    ops, kind = ov.opset13, node.get_type_name()
    if kind == "Convert":
        return ops.convert(operands[0], node.get_output_element_type(0))
    if kind == "FakeQuantize":
        return ops.fake_quantize(*operands, node.get_attributes()["levels"])
    return {"Multiply": ops.multiply, "Subtract": ops.subtract}[kind](*operands)


def _can_be_cut(value: ov.Output) -> bool:
    """Whether :func:`_cut` can take a part of a value."""
    node, kind = value.get_node(), value.get_node().get_type_name()
    if kind == "Reshape":
        node = node.input_value(0).get_node()
    if node.get_type_name() == "Constant":
        return bool(node.data.size == math.prod(value.get_shape()))  # less where two elements share a byte
    return kind in ("Convert", "Multiply", "Subtract") and all(map(_can_be_cut, node.input_values()))


def _cut(value: ov.Output, axis: int, number: int, size: int) -> ov.Output:
    """Part of a constant, or of what is computed from constants, along an axis counted from the end."""
    node, shape = value.get_node(), list(value.get_shape())
    if len(shape) < -axis or shape[axis] == 1:
        return value
    source = node.input_value(0).get_node() if node.get_type_name() == "Reshape" else node
    if source.get_type_name() != "Constant":
        return _anew(node, [_cut(each, axis, number, size) for each in node.input_values()]).output(0)
    data = np.take(source.data.reshape(shape), range(number * size, (number + 1) * size), axis)
    # The type is given, as NumPy has bfloat16 as float16.
    cut = ov.op.Constant(ov.Tensor(data, ov.Shape(list(data.shape)), value.get_element_type()), shared_memory=False)
    cut.set_friendly_name(part(source.get_friendly_name(), number))
    return cut.output(0)
