"""What a compiled model really runs: read from its execution graph."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from optc import layer_precision
from optc_openvino.graph import whole
from optc_openvino.runtime import ov

_LAYERS = frozenset(("Convolution", "Deconvolution", "FullyConnected"))
_WEIGHT_CHAIN = frozenset(("Convert", "Eltwise", "Reorder", "Reshape", "Subgraph", "Transpose"))
"""What may stand between a layer and its weights: moves, and a dequantization that was not folded into the layer."""
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
        weights: the name of a layer's weights in the model.
    """

    name: str
    originals: tuple[str, ...]
    kind: str
    primitive: str
    is_layer: bool
    weights: str = ""

    def runs(self, layer: str, weights: str) -> bool:
        """Whether it runs the layer of that name or with those weights: OpenVINO renames layers that it changes."""
        return layer in self.originals or (self.weights != "" and self.weights == weights)


def kernels(compiled: ov.CompiledModel) -> list[Kernel]:
    """The nodes of the execution graph that compute something."""
    found = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.value) for key, value in node.get_rt_info().items()}
        if info["layerType"] in _NO_ARITHMETIC or node.get_input_size() == 0:
            continue
        weights = _weights(node) if info["layerType"] in _LAYERS or info["layerType"] == "MatMul" else None
        is_layer = info["layerType"] in _LAYERS or weights is not None
        kind = _TYPES.get(info["runtimePrecision"], "")
        if is_layer and _element_type(node, 1) in ("i4", "u4"):
            kind = "int4"
        originals = tuple(info["originalLayersNames"].split(","))
        found.append(Kernel(node.get_friendly_name(), originals, kind, info["primitiveType"], is_layer, weights or ""))
    return found


def precision(executed: list[Kernel]) -> str:
    """What the arithmetic runs in: ``"float32"`` or ``"int8 (7 of 8 layers, 1 float32)"``.

    Counted are convolutions and matrix products with weights, the parts of one as one; without any, all kernels.
    """
    layers = dict.fromkeys((whole(kernel.name), kernel.kind) for kernel in executed if kernel.is_layer)
    counts = Counter(kind for _, kind in layers if kind)
    counts = counts or Counter(kernel.kind for kernel in executed if kernel.kind)
    return layer_precision(counts)


def not_int8(executed: list[Kernel], asked: Mapping[str, str]) -> dict[str, str]:
    """Layers that are quantized in the model and do not run in int8: their weights' names, and what runs instead.

    Args:
        executed: the kernels of the compiled model.
        asked: names of the quantized layers and of their weights, from :func:`optc_openvino.graph.quantized_layers`.
    """
    layers = [kernel for kernel in executed if kernel.is_layer]
    found = {}
    for layer, weights in asked.items():
        name = whole(weights).removesuffix(".T")
        kernel = next((kernel for kernel in layers if kernel.runs(layer, weights)), None)
        if kernel is None:
            found[name] = "OpenVINO runs no such layer"
        elif kernel.kind != "int8":
            found[name] = f"OpenVINO chose the {kernel.kind} kernel {kernel.primitive}"
    return found


def _weights(node: ov.Node) -> str | None:
    """The name of the constant that an operand of a layer is, or is computed from; ``None`` if neither is."""
    return next(filter(None, (_constant(node.input_value(index).get_node()) for index in (1, 0))), None)


def _constant(node: ov.Node) -> str | None:
    """The name of a constant, or of the first one among those a value is computed from; ``None`` if inputs are too."""
    if _layer_type(node) == "Const":
        return str(node.get_friendly_name())
    if _layer_type(node) not in _WEIGHT_CHAIN:
        return None
    operands = (_constant(value.get_node()) for value in node.input_values())
    names = list(itertools.takewhile(lambda name: name is not None, operands))
    return names[0] if len(names) == node.get_input_size() else None


def _layer_type(node: ov.Node) -> str:
    return str(node.get_rt_info()["layerType"].value)


def _element_type(node: ov.Node, index: int) -> str:
    return str(node.get_input_element_type(index).get_type_name())
