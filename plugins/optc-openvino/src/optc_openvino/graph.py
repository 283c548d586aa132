"""What is written in an OpenVINO model: which layers are quantized, and what hides that or a kernel from OpenVINO."""

from __future__ import annotations

import math
import re

import numpy as np

from optc_openvino.runtime import ov

LAYERS = frozenset(
    ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData", "MatMul")
)
_CASTS = frozenset(("Convert", "ConvertLike"))
_MOVES = frozenset(("Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_INT8 = frozenset(("i8", "u8"))
_MIDDLE = 128
"""The zero point with which uint8 is symmetric, but for one value."""


def drop_zero_points(model: ov.Model) -> int:
    """Remove, in place, subtractions of zero from integer constants; returns how many.

    ONNX Runtime needs the zero points that symmetric weights have in ONNX. OpenVINO's low-precision transformations
    do not recognise a layer where several share one such constant: at a fixed batch 25 of ViT-Ti/16's 50 layers and
    all of ConvNeXt-T's convolutions ran in float32 (OpenVINO 2026.4).
    """
    dropped = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Subtract" or node.input_value(0).get_node().get_type_name() != "Convert":
            continue
        weights, zero_point = (constant(node.input_value(index)) for index in (0, 1))
        if weights is None or zero_point is None or weights.get_element_type().is_real() or zero_point.data.any():
            continue
        if node.get_output_partial_shape(0) == node.get_input_partial_shape(0):
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(node.input_value(0))
            dropped += 1
    return dropped


def drop_repeated_quantizations(model: ov.Model) -> int:
    """Remove, in place, quantizations of what was quantized alike and only moved since; returns how many.

    ONNX Runtime needs one on both sides of a transposition, to make it in 8 bits. OpenVINO makes it in 8 bits anyhow,
    and rounds the second time in a kernel of its own.
    """
    seen: dict[str, list[ov.Node]] = {}
    dropped = 0
    for node in model.get_ordered_ops():
        chain = quantization(node.input_value(0)) if node.get_type_name() == "FakeQuantize" else []
        if not chain:
            continue
        source = node.input_value(0).get_node()
        while source.get_type_name() in _MOVES:
            source = source.input_value(0).get_node()
        before = seen.get(source.get_name(), [])
        if len(before) == len(chain) and all(map(_alike, before, chain)):
            chain[-1].output(0).replace(node.input_value(0))
            dropped += 1
        else:
            seen[chain[-1].get_name()] = chain
    return dropped


def quantization(value: ov.Output) -> list[ov.Node]:
    """The nodes that round a value with one scale and scale it back, where they are all that reads it or each other."""
    chain: list[ov.Node] = []
    for kind in ("FakeQuantize", "Convert", "Convert", "Subtract", "Multiply"):
        readers = [target.get_node() for target in value.get_target_inputs()]
        if [reader.get_type_name() for reader in readers] == ["Multiply"] and kind == "Subtract":
            continue
        if [reader.get_type_name() for reader in readers] != [kind]:
            return []
        if any(constant(other) is None or math.prod(other.get_shape()) != 1 for other in readers[0].input_values()[1:]):
            return []
        chain.append(readers[0])
        value = readers[0].output(0)
    return chain


def _alike(one: ov.Node, other: ov.Node) -> bool:
    """Whether two nodes of one kind have the same constants and types."""
    if one.get_output_element_type(0) != other.get_output_element_type(0):
        return False
    pairs = zip(one.input_values()[1:], other.input_values()[1:], strict=True)
    return all(_number(constant(first)) == _number(constant(second)) for first, second in pairs)


def use_signed_activations(model: ov.Model) -> int:
    """Store, in place, activations in uint8 with zero point 128 as the same integers less 128; returns how many.

    A zero point is something that oneDNN's kernels have to make up for, and int8 has none. ``quant`` writes this one
    only for CPUs where that shows (AMX).
    """
    changed = 0
    for node in model.get_ordered_ops():
        readers = _readers(node) if _is_uint8(node) else []
        shifts = _subtractions(readers[0], _MIDDLE) if len(readers) == 1 else []
        if not shifts:
            continue
        kind = node.get_output_element_type(0)
        ends = (ov.opset13.constant(end - _MIDDLE, kind) for end in (0, 255))
        signed = ov.opset13.fake_quantize(*(node.input_value(index) for index in (0, 1, 2)), *ends, 256)
        stored = ov.opset13.convert(signed, "i8")
        for old, new in ((node, signed), (readers[0], stored)):
            new.set_friendly_name(old.get_friendly_name())
        for shift in shifts:
            shift.output(0).replace(ov.opset13.convert(stored, shift.get_output_element_type(0)).output(0))
        changed += 1
    return changed


def _is_uint8(node: ov.Node) -> bool:
    """Whether a node quantizes to the integers from 0 to 255."""
    ends = [constant(node.input_value(index)) for index in (3, 4)] if node.get_type_name() == "FakeQuantize" else []
    return [None if end is None else end.data.tolist() for end in ends] == [0.0, 255.0]


def _subtractions(cast: ov.Node, number: int) -> list[ov.Node]:
    """The subtractions of ``number`` that are all that reads a cast to uint8; empty where something else reads it."""
    if cast.get_type_name() != "Convert" or cast.get_output_element_type(0) != ov.Type.u8:
        return []
    found = [(wide, reader) for wide in _readers(cast) for reader in _readers(wide)]
    for wide, reader in found:
        shift = constant(reader.input_value(1)) if reader.get_type_name() == "Subtract" else None
        if wide.get_type_name() != "Convert" or shift is None or shift.data.tolist() != number:
            return []
    return [reader for _, reader in found]


def _readers(node: ov.Node) -> list[ov.Node]:
    return [target.get_node() for target in node.output(0).get_target_inputs()]


def use_hsigmoid(model: ov.Model) -> int:
    """Replace, in place, HardSigmoid of slope 1/6 and offset 1/2 by HSigmoid, the same function; returns how many.

    PyTorch's hard sigmoid comes through ONNX as the former, for which OpenVINO's CPU plugin has a plain C++ loop over
    float32 in channels-first order, with a reorder before and after (OpenVINO 2026.4); HSigmoid is compiled together
    with its neighbours.
    """
    replaced = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "HardSigmoid":
            continue
        slope, offset = (constant(node.input_value(index)) for index in (1, 2))
        if slope is None or offset is None:
            continue
        rounding = 1e-6 if slope.get_element_type() == ov.Type.f32 else 2**-8
        if math.isclose(_number(slope), 1 / 6, rel_tol=rounding) and _number(offset) == 0.5:
            gate = ov.opset5.hsigmoid(node.input_value(0))
            gate.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(gate.output(0))
            replaced += 1
    return replaced


def quantized_layers(model: ov.Model) -> dict[str, str]:
    """Layers whose weights and input are both quantized to 8 bits: names in the model, and their weights' names."""
    found = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() in LAYERS and _is_dequantized(node.input_value(0)):
            weights = constant(node.input_value(1), past_scales=True)
            if weights is not None and weights.get_element_type().get_type_name() in _INT8:
                found[node.get_friendly_name()] = weights.get_friendly_name()
    return found


def constant(value: ov.Output, past_scales: bool = False) -> ov.Node | None:
    """The constant a value is a cast or view of, and where ``past_scales`` a dequantization of; ``None`` if none."""
    node = value.get_node()
    while node.get_type_name() in _MOVES | _CASTS or (past_scales and node.get_type_name() in ("Multiply", "Subtract")):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def part(name: str, number: int) -> str:
    """The name of a part of something of that name, such as a third of a layer's weights."""
    return f"{name}/{number}"


def whole(name: str) -> str:
    """The name of what something is a :func:`part` of, or its own. OpenVINO adds to names what it made of a node."""
    return re.sub(r"/\d+(/.*)?$", "", name)


def _number(constant: ov.Node) -> float:
    return float(constant.get_data(dtype=np.float32).item())


def _is_dequantized(value: ov.Output) -> bool:
    """Whether a value is 8-bit integers times a scale, seen through views."""
    node = value.get_node()
    while node.get_type_name() in _MOVES | _CASTS | {"Multiply", "Subtract"}:
        if node.get_type_name() == "Convert" and node.get_input_element_type(0).get_type_name() in _INT8:
            return True
        node = node.input_value(0).get_node()
    return False
