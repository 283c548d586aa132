"""Layers that ONNX Runtime computed in another type than the graph asks for, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from onnx import TensorProto

from optc.lowering.onnxruntime_profile import BLOCK_KERNELS, Kernel, inserted_casts, plain_name
from optc.rewrite import is_quantized, label, quantized_attention

if TYPE_CHECKING:
    from torch import fx

    from optc.program import Program

_LAYERS = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_MOVES = frozenset(("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"))
_CLAMPS = frozenset(("Clip", "Relu"))
"""What ONNX Runtime folds into the quantization that follows."""
_TYPES = {
    **dict.fromkeys((TensorProto.INT8, TensorProto.UINT8), "int8"),
    **dict.fromkeys((TensorProto.INT4, TensorProto.UINT4), "int4"),
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
_CARRIERS = frozenset(("view", "reshape", "permute", "transpose", "t", "clone", "_to_copy", "to"))
"""Operators of the graph between a constant and what computes with it."""
_HALF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True)
class Layer:
    """A convolution or matrix product with weights, as the file has it.

    Attributes:
        weights: the name of the constant.
        weight_type: the type it is stored in: ``"int8"``, ``"int4"``, ``"float16"``, ``"bfloat16"`` or ``"float32"``.
        input_quantized: whether what it reads are dequantized 8-bit integers.
        followed_by: the operators of what follows it, as far as each value has one reader.
        names: those that a kernel made of it may have: its own, its output's, those of what may be fused into it.
    """

    node: str
    operator: str
    weights: str
    weight_type: str
    input_quantized: bool
    followed_by: tuple[str, ...]
    names: tuple[str, ...]

    def why_float(self, kernel: Kernel | None) -> str:
        """Why it does not compute in int8, in plain words."""
        if self.weight_type != "int8":
            return "its weight is not quantized to 8 bits in the graph"
        if not self.input_quantized:
            return "its input is not quantized in the graph"
        if kernel is not None and kernel.provider == "CUDAExecutionProvider":
            return "onnxruntime's CUDA provider has no int8 kernels"
        follows = next((operator for operator in self.followed_by if operator not in _CLAMPS), "")
        if "Conv" in self.operator and follows != "QuantizeLinear":
            here = f"{follows} comes first" if follows else "other nodes read it too"
            return f"onnxruntime convolves in int8 only where the output is quantized at once; here {here}"
        return _ran(kernel)


def deviations(program: Program, path: Path, ran: Sequence[Kernel]) -> dict[str, Any]:
    """What ONNX Runtime computed otherwise than the graph says, for ``Lowered.details``.

    ``"not_int8"``, of a quantized program: layers that did not run in an int8 kernel, with the reason.
    ``"not_float16"``, ``"not_bfloat16"``, of a program with such values: layers of that type that ran in another.
    ``"inserted_casts"``, where there are any: casts that ONNX Runtime added, by what they cast.
    ``"engines"``, alone: how many parts TensorRT compiled, which do not say what they compute in.
    """
    engines = sum(kernel.is_engine for kernel in ran)
    if engines:
        return {"engines": engines}
    quantized = is_quantized(program)
    dtypes = {getattr(node.meta.get("val"), "dtype", None) for node in program.graph.nodes}
    half = [name for dtype, name in _HALF.items() if dtype in dtypes]
    if not quantized and not half:
        return {}
    graph = onnx.load(path, load_external_data=False).graph
    labels = _labels(program)
    executed = [(layer, next(labels[layer.weights], layer.node), kernel) for layer, kernel in match(layers(graph), ran)]
    details: dict[str, Any] = {}
    if quantized:
        details["not_int8"] = {
            name: layer.why_float(kernel)
            for layer, name, kernel in executed
            if kernel is None or kernel.kind not in ("int8", "int4")
        }
        attention = "onnxruntime has no int8 kernel for attention: its queries and keys are rounded, and stay in float"
        details["not_int8"] |= {label(node): attention for node in quantized_attention(program)}
    for kind in half:
        details[f"not_{kind}"] = {
            name: _ran(kernel)
            for layer, name, kernel in executed
            if layer.weight_type == kind and (kernel is None or kernel.kind != kind)
        }
    casts = inserted_casts(ran, (node.name for node in graph.node))
    return {**details, **({"inserted_casts": casts} if casts else {})}


def _ran(kernel: Kernel | None) -> str:
    return (
        f"onnxruntime chose the {kernel.kind} kernel {kernel.operator}" if kernel else "onnxruntime ran no such layer"
    )


def with_weight_types(ran: Sequence[Kernel], path: Path) -> list[Kernel]:
    """The kernels, those of blocks with the type of their weights, which the profile does not have."""
    graph = onnx.load(path, load_external_data=False).graph
    types = {id(kernel): layer.weight_type for layer, kernel in match(layers(graph), ran)}
    return [
        replace(kernel, weights=types.get(id(kernel), "int8")) if kernel.operator in BLOCK_KERNELS else kernel
        for kernel in ran
    ]


def fused(path: Path, ran: Sequence[Kernel]) -> dict[str, tuple[str, ...]]:
    """By the kernel's name, for each layer that ran, the names in the file of what is known to be in its kernel.

    ONNX Runtime names a kernel of several nodes after one of them: the layer and all up to that one are in it.
    """
    graph = onnx.load(path, load_external_data=False).graph
    found = {}
    for layer, kernel in match(layers(graph), ran):
        if kernel is not None:
            found[kernel.node] = layer.names[: layer.names.index(plain_name(kernel.node)) + 1]
    return found


def layers(graph: onnx.GraphProto) -> list[Layer]:
    """The layers of a file, in order."""
    constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        weights = _source(node.input[1], producers, dequantized=True) if node.op_type in _LAYERS else ""
        if weights in constants:
            before = producers.get(_source(node.input[0], producers))
            after = list(_chain(node, readers))
            names = [name for each in (node, *after) for name in (each.name, each.output[0])]
            found.append(
                Layer(
                    node=node.name,
                    operator=node.op_type,
                    weights=weights,
                    weight_type=_TYPES.get(constants[weights], "float32"),
                    input_quantized=before is not None
                    and before.op_type == "DequantizeLinear"
                    and before.input[0] not in constants,
                    followed_by=tuple(each.op_type for each in after),
                    names=tuple(names),
                )
            )
    return found


def _source(name: str, producers: Mapping[str, onnx.NodeProto], dequantized: bool = False) -> str:
    """The value that ``name`` is a view or cast of, and if ``dequantized`` what it is a dequantization of."""
    while name in producers:
        node = producers[name]
        if node.op_type not in _MOVES and not (dequantized and node.op_type == "DequantizeLinear"):
            break
        name = node.input[0]
    return name


def _chain(node: onnx.NodeProto, readers: Mapping[str, Sequence[onnx.NodeProto]]) -> Iterator[onnx.NodeProto]:
    """What follows a layer, one reader after the other, up to a quantization or the next layer."""
    while len(following := readers.get(node.output[0], ())) == 1:
        node = following[0]
        if node.op_type in _LAYERS:
            return
        yield node
        if node.op_type == "QuantizeLinear":
            return


def match(found: Sequence[Layer], ran: Sequence[Kernel]) -> list[tuple[Layer, Kernel | None]]:
    """Each layer with the kernel that ran it: one whose name is the layer's or that of something fused into it.

    ONNX Runtime adds to names what it did to the node. Where several kernels could be meant, the layer's own name goes
    before those of what follows it.
    """
    free = {plain_name(kernel.node): kernel for kernel in ran if kernel.is_layer}
    return [(layer, next((free.pop(name) for name in layer.names if name in free), None)) for layer in found]


def _labels(program: Program) -> dict[str, Iterator[str]]:
    """Labels for people of what reads each constant, in the order of the graph, by the constant's name in the file.

    That is the program's own name for it, with ``.int4`` where 4 bits are stored, and ``.T`` where it is transposed.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            for name in (f"{node.target}{suffix}" for suffix in ("", ".T", ".int4", ".int4.T")):
                found[name] += (label(reader) for reader in _readers(node))
    return defaultdict(lambda: iter(()), {name: iter(dict.fromkeys(readers)) for name, readers in found.items()})


def _readers(constant: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a constant itself, dequantized, cast or as a view."""
    for user in constant.users:
        name = str(getattr(getattr(user.target, "_schema", None), "name", "")).rpartition("::")[2]
        if name.startswith("dequantize_") or name in _CARRIERS:
            yield from _readers(user)
        else:
            yield user
