"""What is written in an OpenVINO model: which layers are quantized, and zero points that hide it."""

from __future__ import annotations

from optc_openvino.runtime import ov

LAYERS = frozenset(
    ("Convolution", "ConvolutionBackpropData", "GroupConvolution", "GroupConvolutionBackpropData", "MatMul")
)
_MOVES = frozenset(("Convert", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_INT8 = frozenset(("i8", "u8"))


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
        weights, zero_point = (_constant(node.input_value(index)) for index in (0, 1))
        if weights is None or zero_point is None or weights.get_element_type().is_real() or zero_point.data.any():
            continue
        if node.get_output_partial_shape(0) == node.get_input_partial_shape(0):
            for reader in node.output(0).get_target_inputs():
                reader.replace_source_output(node.input_value(0))
            dropped += 1
    return dropped


def quantized_layers(model: ov.Model) -> dict[str, str]:
    """Layers whose weights and input are both quantized to 8 bits: names in the model, and their weights' names."""
    found = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() in LAYERS and _is_dequantized(node.input_value(0)):
            weights = _constant(node.input_value(1), past_scales=True)
            if weights is not None and weights.get_element_type().get_type_name() in _INT8:
                found[node.get_friendly_name()] = weights.get_friendly_name()
    return found


def _constant(value: ov.Output, past_scales: bool = False) -> ov.Node | None:
    """The constant a value is a cast or view of, and where ``past_scales`` a dequantization of; ``None`` if none."""
    node = value.get_node()
    while node.get_type_name() in _MOVES or (past_scales and node.get_type_name() in ("Multiply", "Subtract")):
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _is_dequantized(value: ov.Output) -> bool:
    """Whether a value is 8-bit integers times a scale, seen through views."""
    node = value.get_node()
    while node.get_type_name() in _MOVES or node.get_type_name() in ("Multiply", "Subtract"):
        if node.get_type_name() == "Convert" and node.get_input_element_type(0).get_type_name() in _INT8:
            return True
        node = node.input_value(0).get_node()
    return False
