from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from optc import OptcError, Program, capture
from optc.errors import BackendError
from optc.lowering.onnx_export import export_onnx
from optc.program import complete_meta

Quantize = Callable[[Program], Program]


def run(path: Path, *arrays: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([v.name for v in session.get_inputs()], arrays, strict=True)))


def nodes(path: Path, *types: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(path, load_external_data=False).graph.node if node.op_type in types]


def test_any_batch_size_runs_and_agrees_with_the_graph(captured_block: Program, tmp_path: Path) -> None:
    export_onnx(captured_block, tmp_path / "m.onnx")
    for batch in (1, 3, 8):
        x = torch.randn(batch, 3, 16, 16)
        for ours, graph in zip(run(tmp_path / "m.onnx", x.numpy()), captured_block.run(x), strict=True):
            np.testing.assert_allclose(ours, graph.numpy(), rtol=1e-4, atol=1e-5)


def test_names_and_opset(captured_block: Program, tmp_path: Path) -> None:
    files, details = export_onnx(captured_block, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    placeholder = next(iter(captured_block.graph.find_nodes(op="placeholder"))).name
    assert files == ("m.onnx",)
    assert [value.name for value in model.graph.input] == [placeholder]
    assert [value.name for value in model.graph.output] == ["output_0", "output_1"]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert model.opset_import[0].version == details["opset"] >= 21
    assert details["operators"]["Attention"] == 1


def test_a_fixed_batch_stays_fixed(block_model: nn.Module, tmp_path: Path) -> None:
    program = capture(block_model, (torch.randn(3, 3, 16, 16),), dynamic_batch=False)
    export_onnx(program, tmp_path / "m.onnx")
    shape = onnx.load(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [3, 3, 16, 16]


def test_large_weights_go_to_one_file_beside(captured_block: Program, tmp_path: Path) -> None:
    files, _ = export_onnx(captured_block, tmp_path / "m.onnx", external_data_bytes=1000)
    assert files == ("m.onnx", "m.onnx.data")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    assert (tmp_path / "m.onnx.data").stat().st_size >= 0.9 * captured_block.constant_bytes()
    x = captured_block.example_inputs[0]
    np.testing.assert_allclose(
        run(tmp_path / "m.onnx", x.numpy())[0], captured_block.run(x)[0].numpy(), rtol=1e-4, atol=1e-5
    )


def test_weights_are_transposed_in_the_file_not_by_the_runtime(captured_block: Program, tmp_path: Path) -> None:
    export_onnx(captured_block, tmp_path / "m.onnx")
    initializers = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert not [node for node in nodes(tmp_path / "m.onnx", "Transpose") if node.input[0] in initializers]
    assert sum(name.endswith(".T") for name in initializers) == 2  # qkv and proj; the head is a Gemm


def test_a_transposed_weight_may_be_an_output_too(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x @ self.weight.t(), self.weight.t(), self.weight.permute(1, 0) + 1

    program = capture(Both(), (torch.randn(2, 8),))
    export_onnx(program, tmp_path / "m.onnx")
    x = torch.randn(3, 8)
    for ours, graph in zip(run(tmp_path / "m.onnx", x.numpy()), program.run(x), strict=True):
        np.testing.assert_allclose(ours, graph.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_no_source_paths_are_written(captured_block: Program, tmp_path: Path) -> None:
    export_onnx(captured_block, tmp_path / "m.onnx")
    content = (tmp_path / "m.onnx").read_bytes()
    assert b".py" not in content
    assert b"stack_trace" not in content


@pytest.mark.parametrize("name", ["cnn", "block"])
def test_quantized_weights_stay_integers(
    name: str, tmp_path: Path, quantized: Quantize, request: pytest.FixtureRequest
) -> None:
    program = quantized(request.getfixturevalue(name))
    export_onnx(program, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    layers = nodes(tmp_path / "m.onnx", "Conv", "Gemm", "MatMul")
    weights = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    assert len(layers) == 4
    for layer in layers:
        weight = weights[layer.input[1]]
        assert types[weight.input[0]] == types[weight.input[2]] == onnx.TensorProto.INT8
        assert types[weight.input[1]] == onnx.TensorProto.FLOAT
        activation = weights[layer.input[0]]
        assert types[activation.input[2]] == onnx.TensorProto.UINT8
        if layer.op_type in ("Conv", "Gemm"):
            assert types[weights[layer.input[2]].input[0]] == onnx.TensorProto.INT32
    # The integers as they are, one byte each: scales and names are all that comes on top.
    assert (tmp_path / "m.onnx").stat().st_size < program.constant_bytes() + 25_000


def test_quantized_transposed_weights_keep_their_channel_axis(
    block: Program, tmp_path: Path, quantized: Quantize
) -> None:
    program = quantized(block)
    export_onnx(program, tmp_path / "m.onnx")
    matmuls = {node.input[1] for node in nodes(tmp_path / "m.onnx", "MatMul")}
    axes = [
        attribute.i
        for node in nodes(tmp_path / "m.onnx", "DequantizeLinear")
        if node.output[0] in matmuls
        for attribute in node.attribute
        if attribute.name == "axis"
    ]
    assert axes == [1, 1]


def test_layers_sharing_a_bias_keep_their_own_scales(tmp_path: Path, quantized: Quantize) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            nn.init.constant_(self.one.bias, 0.5)
            nn.init.constant_(self.two.bias, -0.5)
            self.two.weight.data *= 10

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x))

    program = quantized(capture(Twice(), (torch.randn(2, 5, 8),)))
    export_onnx(program, tmp_path / "m.onnx")
    x = program.example_inputs[0]
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x.numpy())[0], program.run(x)[0].numpy(), atol=0.1)


def test_an_operator_without_onnx_form_is_named_with_node_and_module(tmp_path: Path) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.stem(x).relu()

    program = capture(Outer(), (torch.randn(2, 3),))
    with pytest.raises(BackendError) as caught:
        export_onnx(program, tmp_path / "m.onnx")
    for part in ("aten.special_bessel_j0.default", "special_bessel_j0", "module 'stem'", "no ONNX form", "--backend"):
        assert part in str(caught.value), part
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_graph_that_fixes_the_batch_is_refused(cnn: Program, tmp_path: Path) -> None:
    view = next(node for node in cnn.graph.nodes if "view" in str(node.target) or "flatten" in str(node.target))
    view.target, view.args = torch.ops.aten.view.default, (view.args[0], [2, -1])
    del view.meta["val"]
    complete_meta(cnn)
    cnn.module.recompile()
    with pytest.raises(OptcError, match="batch"):
        export_onnx(cnn, tmp_path / "m.onnx")


def test_the_exporter_keeps_silent(
    cnn: Program, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        export_onnx(cnn, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_program_is_translated_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    translations = []
    export = torch.onnx.export
    monkeypatch.setattr(
        torch.onnx, "export", lambda *args, **options: translations.append(1) or export(*args, **options)
    )
    program = capture(nn.Linear(4, 3), (torch.randn(2, 4),))
    x = torch.randn(2, 4)
    for name in ("first", "second"):
        export_onnx(program, tmp_path / f"{name}.onnx")
    assert len(translations) == 1
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()
    with torch.no_grad():
        dict(program.constants())["weight"].mul_(2)
    export_onnx(program, tmp_path / "third.onnx")
    assert len(translations) == 2
    np.testing.assert_allclose(run(tmp_path / "third.onnx", x.numpy())[0], program.run(x)[0].numpy(), rtol=1e-5)


def test_a_second_file_does_not_need_the_first_ones_data(tmp_path: Path) -> None:
    program = capture(nn.Linear(64, 64), (torch.randn(2, 64),))
    x = torch.randn(2, 64)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        files, _ = export_onnx(program, tmp_path / name / "m.onnx", external_data_bytes=0)
        assert files == ("m.onnx", "m.onnx.data")
        if name == "first":
            for file in files:
                (tmp_path / name / file).unlink()
    np.testing.assert_allclose(run(tmp_path / "second" / "m.onnx", x.numpy())[0], program.run(x)[0].numpy(), atol=1e-5)
