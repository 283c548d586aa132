"""Models in bfloat16: float32 at their ends, and OpenVINO's own inference precision instead of casts."""

from __future__ import annotations

from typing import Any

from optc_openvino.graph import quantized_layers
from optc_openvino.runtime import INFERENCE_PRECISION, computes_bfloat16, ov

_FLOATS = ("f32", "bf16")
_HARMLESS = frozenset(
    (
        *("Parameter", "Result", "ShapeOf", "Broadcast", "Convert", "ConvertLike", "FakeQuantize"),
        *("Concat", "Gather", "Pad", "Reshape", "Slice", "Split", "Squeeze", "StridedSlice", "Transpose", "Unsqueeze"),
        *("Add", "Multiply", "Subtract", "Maximum", "Minimum", "Clamp", "Relu", "PRelu", "LeakyRelu"),
        *("Elu", "Gelu", "HSigmoid", "HSwish", "HardSigmoid", "Mish", "Sigmoid", "Swish", "Tanh"),
        *("AvgPool", "MaxPool", "AdaptiveAvgPool", "ReduceMean", "ReduceMax", "MVN", "GroupNormalization"),
    )
)
"""What may be in float32 between quantized layers: moves, and operators that lose no more than one rounding."""


def take_and_give_float32(model: ov.Model) -> ov.Model:
    """The model with float32 in place of bfloat16, which NumPy has not, as the type of inputs and outputs."""
    if not any(_type(port) == "bf16" for port in (*model.inputs, *model.outputs)):
        return model
    around = ov.preprocess.PrePostProcessor(model)
    for ports, side in ((model.inputs, around.input), (model.outputs, around.output)):
        for index, port in enumerate(ports):
            if _type(port) == "bf16":
                side(index).tensor().set_element_type(ov.Type.f32)
    return around.build()


def use_inference_precision(model: ov.Model) -> bool:
    """Drop the casts of a model that is in bfloat16 throughout, in place, and note that precision in it.

    OpenVINO fuses layers, activations and attention across such casts only where it sets them itself: ViT-Ti/16 with
    int8 layers and bfloat16 between them took 1.18 times as long with casts (OpenVINO 2026.4, CPU with AVX512_BF16).
    Operators between quantized layers, which are in float32 in the model, then compute in bfloat16 too where OpenVINO
    does not fuse them. A model with a layer, or any operator that bfloat16 might harm, in float32 stays as it is.

    Returns:
        Whether the model was changed.
    """
    if not computes_bfloat16() or not _in_bfloat16_throughout(model):
        return False
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Constant" and _type(node.output(0)) == "bf16":
            readers = node.output(0).get_target_inputs()
            wide = ov.opset13.convert(node, "f32").output(0)
            for reader in readers:
                reader.replace_source_output(wide)
        elif kind in ("Convert", "ConvertLike") and _computed(node) and _is_cast(node):
            node.output(0).replace(node.input_value(0))
    model.validate_nodes_and_infer_types()
    model.set_rt_info("bf16", list(INFERENCE_PRECISION))
    return True


def _in_bfloat16_throughout(model: ov.Model) -> bool:
    """Whether a model computes in bfloat16, and has nothing in float32 but quantized layers and what is harmless."""
    quantized = quantized_layers(model)
    found = False
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if node.get_output_size() == 0 or not _computed(node):
            continue
        types = {_type(value) for value in node.outputs()}
        found |= "bf16" in types
        if types & {"f16", "f64"}:
            return False
        if "f32" in types and kind not in _HARMLESS and node.get_friendly_name() not in quantized:
            return False
    return found


def _computed(node: ov.Node) -> bool:
    """Whether a node's value depends on the model's inputs, as far as its own operands tell."""
    return any(value.get_node().get_type_name() != "Constant" for value in node.input_values())


def _is_cast(node: ov.Node) -> bool:
    return _type(node.input_value(0)) in _FLOATS and _type(node.output(0)) in _FLOATS


def _type(value: Any) -> str:
    return str(value.get_element_type().get_type_name())
