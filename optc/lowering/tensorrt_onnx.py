"""Strongly typed QDQ ONNX for TensorRT: what ``trtexec --stronglyTyped`` and ONNX Runtime's TensorRT provider take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, numpy_helper

from optc.errors import BackendError
from optc.lowering.onnx_export import EXTERNAL_DATA_BYTES, export_onnx
from optc.lowering.tensorrt_quant import tensorrt_form
from optc.program import Program

OPSET = 22
"""The lowest opset whose Conv takes bfloat16, and without Attention, which older
parsers lack. TensorRT 10.15 and 11.2 take opsets 9 to 24."""
_INT8_BETWEEN = ("QuantizeLinear", "DequantizeLinear")
_UNSUPPORTED = {TensorProto.UINT8: "uint8", TensorProto.DOUBLE: "float64"}


def export_tensorrt_onnx(
    program: Program, path: Path, external_data_bytes: int = EXTERNAL_DATA_BYTES
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Write ``program`` as ONNX in the types of its graph and with quantization by TensorRT's rules.

    Symmetric int8 with zero point 0, weights per output channel, biases in float, int8 values only between a
    QuantizeLinear and a DequantizeLinear, nothing in uint8 or float64. Needs no GPU. Build it with
    ``trtexec --onnx=FILE --stronglyTyped``, so that TensorRT chooses no other types.

    Args:
        path: the ``.onnx`` file to write.
        external_data_bytes: weights beyond this many bytes are written beside it as ``<path>.data``.

    Returns:
        As :func:`optc.export_onnx`.

    Raises:
        BackendError: the quantization is not symmetric int8 (quantize for the device cuda), an operator has no ONNX
            form, or the file breaks one of the rules; names the nodes.
    """
    return export_onnx(tensorrt_form(program), path, OPSET, external_data_bytes, _refuse_broken)


def _refuse_broken(path: Path) -> None:
    broken = broken_rules(onnx.load(path, load_external_data=False), path.parent)
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise BackendError(f"TensorRT would refuse the ONNX file: {'; '.join(broken[:3])}{more}")


def broken_rules(model: onnx.ModelProto, folder: Path) -> list[str]:
    """What of a model's types and quantization TensorRT's parser does not take, one line per node.

    Rules of ``docs/operators.md`` of onnx-tensorrt 10.15.

    Args:
        folder: where the file's external data is.
    """
    model = onnx.shape_inference.infer_shapes(model)
    constants = {value.name: value for value in model.graph.initializer}
    types = {value.name: value.data_type for value in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    broken = []
    for node in model.graph.node:
        for name in (*node.input, *node.output):
            kind = types.get(name)
            if kind in _UNSUPPORTED:
                broken.append(f"{node.op_type} '{node.name}' has {_UNSUPPORTED[kind]} '{name}'")
            elif kind == TensorProto.INT8 and node.op_type not in _INT8_BETWEEN:
                broken.append(f"{node.op_type} '{node.name}' has int8 '{name}', which goes into DequantizeLinear only")
        if node.op_type in _INT8_BETWEEN:
            broken += [f"{node.op_type} '{node.name}' {why}" for why in _broken_pair(node, constants, types, folder)]
    return broken


def _broken_pair(
    node: onnx.NodeProto, constants: dict[str, TensorProto], types: dict[str, int], folder: Path
) -> list[str]:
    """What is wrong with one QuantizeLinear or DequantizeLinear."""
    found = []
    integers = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
    if types.get(integers) != TensorProto.INT8:
        found.append(f"has {TensorProto.DataType.Name(types.get(integers, 0)).lower()} values, not int8")
    if node.input[1] not in constants:
        found.append("has a scale that is computed")
    if len(node.input) > 2 and node.input[2]:
        zero_point = constants.get(node.input[2])
        if zero_point is None or numpy_helper.to_array(zero_point, str(folder)).any():
            found.append("has a zero point that is not 0")
    return found
