"""What a compiled model really runs: read from its execution graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from optc_openvino.runtime import ov

_LAYERS = frozenset(("Convolution", "Deconvolution", "FullyConnected"))
_MOVES = frozenset(("Convert", "Reorder", "Reshape", "Transpose"))
_NO_ARITHMETIC = frozenset(("Const", "Input", "Output", "Reorder", "Reshape", "Transpose", "Convert", "ShapeOf"))
_TYPES = {
    "f32": "float32",
    "f64": "float64",
    "f16": "float16",
    "bf16": "bfloat16",
    "i8": "int8",
    "u8": "int8",
    "i4": "int4",
    "u4": "int4",
}


@dataclass(frozen=True)
class Kernel:
    """One node of the execution graph.

    Attributes:
        name: its name there.
        originals: the names of the nodes it was made from in the model.
        kind: what it computes in, as ``"float32"``, ``"bfloat16"``, ``"int8"`` or ``"int4"``.
        primitive: OpenVINO's name of the kernel, such as ``"brgemm_avx512_I8"``.
        is_layer: whether it is a convolution or a matrix product with weights.
    """

    name: str
    originals: tuple[str, ...]
    kind: str
    primitive: str
    is_layer: bool

    def runs(self, layer: str) -> bool:
        """Whether it runs the model's node of that name, which OpenVINO may have renamed by appending to it."""
        return any(name == layer or name.startswith(f"{layer}/") for name in (self.name, *self.originals))


def kernels(compiled: ov.CompiledModel) -> list[Kernel]:
    """The nodes of the execution graph that compute something."""
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.value) for key, value in node.get_rt_info().items()}
        if info["layerType"] in _NO_ARITHMETIC or node.get_input_size() == 0:
            continue
        is_layer = info["layerType"] in _LAYERS or (info["layerType"] == "MatMul" and _has_weights(node))
        kind = _TYPES.get(info["runtimePrecision"], "")
        if is_layer and _element_type(node, 1) in ("i4", "u4"):
            kind = "int4"
        originals = tuple(info["originalLayersNames"].split(","))
        found.append(Kernel(node.get_friendly_name(), originals, kind, info["primitiveType"], is_layer))
    return found


def precision(executed: list[Kernel]) -> str:
    """What the arithmetic runs in: ``"float32"`` or ``"int8 (7 of 8 layers, 1 float32)"``.

    Counted are convolutions and matrix products with weights; without any, all kernels.
    """
    counts = Counter(kernel.kind for kernel in executed if kernel.is_layer and kernel.kind)
    counts = counts or Counter(kernel.kind for kernel in executed if kernel.kind)
    if not counts:
        return "no arithmetic"
    low = [kind for kind in ("int4", "int8") if kind in counts]
    first = low[0] if low else counts.most_common(1)[0][0]
    if not low and len(counts) == 1:
        return first
    rest = "".join(f", {number} {kind}" for kind, number in counts.most_common() if kind != first)
    return f"{first} ({counts[first]} of {counts.total()} layers{rest})"


def not_int8(executed: list[Kernel], asked: Mapping[str, str]) -> dict[str, str]:
    """Layers that are quantized in the model and do not run in int8: their weights' names, and what runs instead.

    Args:
        executed: the kernels of the compiled model.
        asked: names of the quantized layers and of their weights, from :func:`optc_openvino.graph.quantized_layers`.
    """
    found = {}
    for layer, weights in asked.items():
        kernel = next((kernel for kernel in executed if kernel.is_layer and kernel.runs(layer)), None)
        if kernel is None:
            found[weights] = "OpenVINO replaced the layer by something else"
        elif kernel.kind != "int8":
            found[weights] = f"OpenVINO chose the {kernel.kind} kernel {kernel.primitive}"
    return found


def _has_weights(node: ov.Node) -> bool:
    """Whether one operand of a matrix product is a constant."""
    for index in range(2):
        operand = node.input_value(index).get_node()
        while _layer_type(operand) in _MOVES:
            operand = operand.input_value(0).get_node()
        if _layer_type(operand) == "Const":
            return True
    return False


def _layer_type(node: ov.Node) -> str:
    return str(node.get_rt_info()["layerType"].value)


def _element_type(node: ov.Node, index: int) -> str:
    return str(node.get_input_element_type(index).get_type_name())
