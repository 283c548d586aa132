"""Which layers run in another type than the graph asks for: real sessions, and files written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

import optc
from optc import Program, Target
from optc.batches import as_calibration
from optc.errors import BackendError
from optc.lowering.lowering import Lowering, lower
from optc.lowering.onnxruntime import OnnxRuntimeBackend
from optc.lowering.onnxruntime_layers import Layer, layers, match
from optc.lowering.onnxruntime_profile import Kernel
from optc.passmanager.contract import PassContext
from optc.passmanager.manager import build_passes
from optc.program import complete_meta

TARGET = Target(threads=1)
Quantize = Callable[[Program], Program]


def lowered(program: Program, folder: Path) -> Lowering:
    return lower(OnnxRuntimeBackend(), program, TARGET, folder / "made")


def halved(program: Program, name: str) -> Program:
    return build_passes(name, {})(program, PassContext(TARGET, None, ())).program


def test_layers_that_ran_in_float_are_named_with_the_reason(cnn: Program, tmp_path: Path, quantized: Quantize) -> None:
    made = lowered(quantized(cnn), tmp_path)
    only = "onnxruntime convolves in int8 only where the output is quantized at once; here "
    assert made.lowered.details["not_int8"] == {
        "conv2d (conv1)": f"{only}other nodes read it too",  # quantized for conv2, and added to what that computes
        "conv2d_1 (conv2)": f"{only}Add comes first",
    }
    assert made.precision == "int8 (2 of 4 layers, 2 float32)"


def test_layers_the_graph_leaves_in_float_are_named_too(block: Program, tmp_path: Path, quantized: Quantize) -> None:
    program = quantized(block)
    plain = next(node for node in block.graph.nodes if node.name == "linear_1")
    node = next(node for node in program.graph.nodes if node.name == "linear_1")
    source = node.args[0].args[0].args[0]
    for name in ("weight", "bias"):
        tensor = block.module.get_parameter(str(plain.args[1 if name == "weight" else 2].target))
        program.module.register_buffer(f"plain_{name}", tensor.detach())
    with program.graph.inserting_before(node):
        node.args = (source, *(program.graph.get_attr(f"plain_{name}") for name in ("weight", "bias")))
    program.graph.eliminate_dead_code()
    program.module.recompile()
    complete_meta(program)
    made = lowered(program, tmp_path)
    not_int8 = made.lowered.details["not_int8"]
    assert not_int8.pop("linear_1 (proj)") == "its weight is not quantized to 8 bits in the graph"
    assert list(not_int8) == ["conv2d (embed)"]
    assert made.precision == "int8 (2 of 4 layers, 2 float32)"


def test_layers_that_share_a_weight_are_told_apart(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(self.shared(x).relu()).relu())

    program = halved(optc.capture(Tied(), (torch.randn(2, 8),)), "fp16")
    details = lowered(program, tmp_path).lowered.details
    assert list(details["not_float16"]) == ["linear (shared)", "linear_1 (shared)", "linear_2 (shared)"]


def test_nothing_is_listed_where_every_layer_runs_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 64, 10)
    )
    images = torch.randn(4, 3, 12, 12)
    made = optc.optimize(
        model, images, "fuse,quant", calibration=[images] * 2, backend="onnxruntime", measure=False, target=TARGET
    )
    assert made.report.precision == "int8 (3 of 3 layers)"
    assert made.details["not_int8"] == {}
    assert "inserted_casts" not in made.details


@pytest.mark.parametrize("name", ["cnn", "block"])
def test_float16_that_runs_in_float32_is_not_silent(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    program = halved(request.getfixturevalue(name), "fp16")
    made = lowered(program, tmp_path)
    details = made.lowered.details
    if made.precision != "float32":
        pytest.skip(f"this onnxruntime has float16 kernels on the CPU: {made.precision}")
    assert len(details["not_float16"]) == 4
    assert all("chose the float32 kernel" in reason for reason in details["not_float16"].values())
    assert details["inserted_casts"]["float16 to float32"] >= 1
    asked = {node.name for node in onnx.load(made.files[0]).graph.node if node.op_type == "Cast"}
    casts = [kernel for kernel in made.load().kernels if kernel.operator == "Cast"]  # type: ignore[attr-defined]
    assert sum(details["inserted_casts"].values()) == len([cast for cast in casts if cast.node not in asked])
    assert "not_int8" not in details


def test_bfloat16_without_kernels_is_one_clear_line(cnn: Program, tmp_path: Path) -> None:
    with pytest.raises(BackendError) as caught:
        lowered(halved(cnn, "bf16"), tmp_path)
    assert "CPUExecutionProvider has no kernel for operator Conv in bfloat16 (node 'node_conv2d')" in str(caught.value)
    assert "--backend eager" in str(caught.value)
    assert "\n" not in str(caught.value)


def conv_relu_add() -> onnx.GraphProto:
    """Two convolutions that are added; the second's weight is behind a cast."""
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "first"),
        helper.make_node("Cast", ["w2"], ["w2f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Conv", ["x", "w2f"], ["b"], "second"),
        helper.make_node("Add", ["a", "b"], ["sum"], "add"),
        helper.make_node("Relu", ["sum"], ["y"], "relu"),
        helper.make_node("MatMul", ["y", "y"], ["z"], "attention"),
    ]
    weights = [
        helper.make_tensor("w1", TensorProto.FLOAT, (1, 1, 1, 1), [1.0]),
        helper.make_tensor("w2", TensorProto.FLOAT16, (1, 1, 1, 1), [1.0]),
    ]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 1, 4, 4))  # noqa: E731
    return helper.make_graph(nodes, "g", [value("x")], [value("z")], weights)


def test_layers_are_what_has_weights() -> None:
    first, second = layers(conv_relu_add())
    assert (first.node, first.weights, first.weight_type) == ("first", "w1", "float32")
    assert (second.node, second.weights, second.weight_type) == ("second", "w2", "float16")
    assert first.followed_by == ("Add", "Relu")
    assert first.names == ("first", "a", "add", "sum", "relu", "y")
    assert first.why_float(None) == "its weight is not quantized to 8 bits in the graph"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["first_nchwc", "fused second"], ["first_nchwc", "fused second"]),
        (["y_nchwc", "b_nchwc"], ["y_nchwc", "b_nchwc"]),
        (["second", "first_token_12"], ["first_token_12", "second"]),
        (
            ["InsertedPrecisionFreeCast_a_nchwc", "second/Fusion"],
            ["InsertedPrecisionFreeCast_a_nchwc", "second/Fusion"],
        ),
        (["second"], [None, "second"]),
    ],
)
def test_a_kernel_is_known_by_what_it_was_made_of(names: list[str], expected: list[str | None]) -> None:
    ran = [Kernel(name, "Conv", "CPUExecutionProvider") for name in names]
    matched = match(layers(conv_relu_add()), ran)
    assert [kernel.node if kernel else None for _, kernel in matched] == expected


def test_the_cuda_provider_has_no_int8_kernels_whatever_follows() -> None:
    layer = Layer("c", "Conv", "w", "int8", True, ("Relu", "Add"), ("c",))
    assert "quantized at once" in layer.why_float(Kernel("c", "Conv", "CPUExecutionProvider"))
    on_cuda = layer.why_float(Kernel("c", "Conv", "CUDAExecutionProvider"))
    assert on_cuda == "onnxruntime's CUDA provider has no int8 kernels"


def test_attention_that_stays_in_float_is_listed(block: Program, tmp_path: Path) -> None:
    calibration = as_calibration([torch.randn(8, 3, 16, 16)], block)
    made = build_passes("quant", {})(block, PassContext(TARGET, calibration)).program
    found = lowered(made, tmp_path).lowered.details["not_int8"]
    (attention,) = [name for name, reason in found.items() if "no int8 kernel for attention" in reason]
    assert attention.startswith("scaled_dot_product_attention")
