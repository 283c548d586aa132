"""QDQ ONNX by TensorRT's rules: the file's types, ONNX's checker, and ONNX Runtime on the CPU against the graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import optc
from optc import PassContext, Program, Target
from optc.errors import BackendError
from optc.lowering.onnx_export import export_onnx
from optc.lowering.tensorrt_onnx import broken_rules
from optc.passmanager.manager import build_passes

X = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Noise:
    description = "noise"

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter([(torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)),)])


_passed: dict[tuple[int, str, str], Program] = {}


def passed(program: Program, passes: str, device: str = "cuda") -> Program:
    """Made once: the programs are those of the session, and no test changes what it gets."""
    key = id(program), passes, device
    if key not in _passed:
        _passed[key] = build_passes(passes, None)(program, PassContext(Target(device), Noise())).program
    return _passed[key]


def sqnr_db(program: Program, path: Path) -> float:
    """Of all outputs, computed by ONNX Runtime."""
    options = ort.SessionOptions()
    # Otherwise it turns int8 into uint8 on CPUs of this kind and stumbles over its own QuantizeLinear (1.32).
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    graph = [output.detach().float().numpy() for output in program.run(X)]
    signal = sum(float(np.square(g).sum()) for g in graph)
    noise = sum(float(np.square(g - o).sum()) for g, o in zip(graph, outputs, strict=True))
    return float(10 * np.log10(signal / noise)) if noise else np.inf


@pytest.mark.parametrize("name", ["captured_cnn", "captured_block"])
@pytest.mark.parametrize(("passes", "least"), [("fuse", 100), ("fuse,fp16", 50), ("fuse,quant", 30)])
def test_onnxruntime_computes_what_the_graph_does(
    name: str, passes: str, least: float, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    program = passed(request.getfixturevalue(name), passes)
    files, details = optc.export_tensorrt_onnx(program, tmp_path / "model.onnx")
    assert files == ("model.onnx",)
    assert details["opset"] == 22
    assert sqnr_db(program, tmp_path / "model.onnx") > least


def test_the_quantized_file_keeps_every_rule(captured_block: Program, tmp_path: Path) -> None:
    program = passed(captured_block, "fuse,quant")
    optc.export_tensorrt_onnx(program, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    weights = {value.name: value for value in model.graph.initializer}
    kinds = {value.data_type for value in weights.values()}
    assert TensorProto.INT8 in kinds
    assert not kinds & {TensorProto.INT32, TensorProto.UINT8, TensorProto.DOUBLE}
    layers = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    made = {name: node for node in model.graph.node for name in node.output}
    quantized = [node for node in layers if all(made[name].op_type == "DequantizeLinear" for name in node.input[:2])]
    assert len(quantized) == 4  # attention's two products stay in float
    for node in quantized:
        weight, scale = (weights[name] for name in made[node.input[1]].input[:2])
        assert weight.data_type == TensorProto.INT8
        assert len(numpy_helper.to_array(scale)) in weight.dims
        assert all(weights[name].data_type == TensorProto.FLOAT for name in node.input[2:])


def test_a_bfloat16_graph_is_bfloat16_in_the_file(captured_cnn: Program, tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 convolution on CPUs, so the types are what can be checked."""
    optc.export_tensorrt_onnx(passed(captured_cnn, "fuse,bf16"), tmp_path / "model.onnx")
    model = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"), strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    convs = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(convs) == 4
    assert {types[node.output[0]] for node in convs} == {TensorProto.BFLOAT16}


def test_attention_is_left_in_operators_every_parser_has(captured_block: Program, tmp_path: Path) -> None:
    _, details = optc.export_tensorrt_onnx(passed(captured_block, "fuse"), tmp_path / "model.onnx")
    assert "Attention" not in details["operators"]
    assert details["operators"]["Softmax"] == 1


def test_zero_points_beside_the_file_are_read(captured_cnn: Program, tmp_path: Path) -> None:
    program = passed(captured_cnn, "fuse,quant")
    files, _ = optc.export_tensorrt_onnx(program, tmp_path / "model.onnx", external_data_bytes=0)
    assert files == ("model.onnx", "model.onnx.data")
    assert sqnr_db(program, tmp_path / "model.onnx") > 30


def test_a_graph_quantized_for_a_cpu_is_refused_and_nothing_is_left(captured_cnn: Program, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="symmetric int8 only"):
        optc.export_tensorrt_onnx(passed(captured_cnn, "fuse,quant", "cpu"), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_float64_graph_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    program = optc.capture(torch.nn.Linear(4, 2).double(), (torch.randn(1, 4, dtype=torch.float64),))
    with pytest.raises(BackendError, match=r"TensorRT would refuse the ONNX file: Gemm .* has float64"):
        optc.export_tensorrt_onnx(program, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_onnxruntime_takes_breaks_the_rules_of_tensorrt(captured_cnn: Program, tmp_path: Path) -> None:
    """uint8 activations with zero points, int32 biases."""
    export_onnx(passed(captured_cnn, "fuse,quant", "cpu"), tmp_path / "model.onnx")
    broken = "; ".join(broken_rules(onnx.load(tmp_path / "model.onnx"), tmp_path))
    assert "has uint8 values, not int8" in broken
    assert "has int32 values, not int8" in broken
    assert "has a zero point that is not 0" in broken


def test_operators_on_int8_are_found(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "quantize"),
        helper.make_node("Reshape", ["q", "shape"], ["r"], "reshape"),
        helper.make_node("DequantizeLinear", ["r", "scale", "zero"], ["y"], "dequantize"),
    ]
    constants = [
        numpy_helper.from_array(np.array(0.5, np.float32), "scale"),
        numpy_helper.from_array(np.array(0, np.int8), "zero"),
        numpy_helper.from_array(np.array([4], np.int64), "shape"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", (2, 2)), ("y", (4,)))
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], constants))
    onnx.checker.check_model(model)
    assert broken_rules(model, tmp_path) == [
        "Reshape 'reshape' has int8 'q', which goes into DequantizeLinear only",
        "Reshape 'reshape' has int8 'r', which goes into DequantizeLinear only",
    ]


def test_a_refused_graph_leaves_an_earlier_file_alone(captured_cnn: Program, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    names, _ = optc.export_tensorrt_onnx(passed(captured_cnn, "fuse"), path, external_data_bytes=0)
    assert names == ("model.onnx", "model.onnx.data")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sqnr_db(captured_cnn, path) > 60
    program = optc.capture(torch.nn.Linear(4, 2).double(), (torch.randn(1, 4, dtype=torch.float64),))
    with pytest.raises(BackendError, match="TensorRT would refuse"):
        optc.export_tensorrt_onnx(program, path, external_data_bytes=0)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
