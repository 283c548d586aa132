from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import optc
from optc.bench.layers import Layer, LayerProfile, artifact_layers, profiled, program_layers
from optc.bench.peaks import Peaks
from optc.lowering import kernel_times
from optc.lowering.artifact import load_artifact
from optc.lowering.kernel_times import KernelTime
from optc.ops.costs import NodeCost

PEAKS = Peaks(1, {"float32": 1e9, "int8": 4e9}, ((1000, 1e9), (1_000_000, 1e8)))
CONV = NodeCost("conv", "aten.conv2d.default", "stem", 1e6, 100, {"x": 50}, 50)
RELU = NodeCost("relu", "aten.relu.default", "act", 100.0, 0, {"conv": 50}, 50)
FC = NodeCost("fc", "aten.linear.default", "head", 2000.0, 999_900, {"relu": 50}, 50, result=True)
COSTS = (CONV, RELU, FC)


def only(time: KernelTime, origins: dict[str, str] | None = None) -> Layer:
    (layer,) = profiled("net", [time], COSTS, origins or {}, PEAKS).layers
    return layer


def test_a_layer_with_many_operations_is_bound_by_compute() -> None:
    layer = only(KernelTime("k", "Conv", 2e-3, "float32", ("conv",)))
    assert layer.operations == 1e6
    assert layer.bytes == 200
    assert layer.floor_seconds == pytest.approx(1e-3)
    assert (layer.bound, layer.share, layer.label) == ("compute", pytest.approx(0.5), "stem")


def test_integers_have_their_own_roof() -> None:
    assert only(KernelTime("k", "QConv", 1e-3, "int8", ("conv",))).floor_seconds == pytest.approx(0.25e-3)


def test_a_layer_of_weights_is_bound_by_the_memory_its_models_weights_are_in() -> None:
    layer = only(KernelTime("k", "Gemm", 2e-2, "float32", ("fc",)))
    assert layer.bound == "memory"
    assert layer.floor_seconds == pytest.approx(999_900 / PEAKS.memory(1_000_000) + 100 / 1e9)


def test_a_layer_far_from_its_roof_is_overhead() -> None:
    assert only(KernelTime("k", "Conv", 5e-3, "float32", ("conv",))).bound == "overhead"


def test_a_kernel_of_several_nodes_hands_on_inside_and_has_the_module_of_the_largest() -> None:
    layer = only(KernelTime("k", "Conv", 2e-3, "float32", ("relu", "conv")))
    assert layer.bytes == 100 + 50 + 50
    assert layer.operations == 1e6 + 100
    assert layer.module == "stem"


def test_names_of_the_runtime_lead_to_nodes_of_the_graph() -> None:
    origins = {"node_conv2d": "conv", "node_q": "quantize"}
    layer = only(KernelTime("k", "QLinearConv", 2e-3, "int8", ("node_conv2d", "node_q", "node_unknown")), origins)
    assert layer.nodes == ("conv",)
    assert only(KernelTime("k", "Conv", 2e-3, "int8", ("conv",)), origins).nodes == ()


def test_work_that_operators_share_counts_once_for_the_slowest() -> None:
    times = [
        KernelTime("bias", "Add", 1e-6, "float32", ("conv",)),
        KernelTime("product", "MatMul", 2e-3, "int8", ("conv",)),
        KernelTime("fc", "Gemm", 1e-6, "float32", ("fc",)),
    ]
    profile = profiled("net", times, (CONV, replace(FC, constant_bytes=0)), {}, PEAKS)
    bias, product, _ = profile.layers
    assert (bias.nodes, bias.module, bias.operations, bias.bound) == (("conv",), "stem", 0.0, "")
    assert (product.operations, product.kind) == (1e6, "int8")
    assert profile.floor_seconds == pytest.approx(1e6 / 4e9 + 2000 / 1e9)


def test_what_the_runtime_added_has_no_roof() -> None:
    layer = only(KernelTime("k", "Reorder", 1e-3))
    assert (layer.bound, layer.operations, layer.share, layer.label) == ("", 0.0, 0.0, "Reorder")


def whole(kind: str = "float32", *costs: NodeCost) -> LayerProfile:
    return profiled("net", [KernelTime("k", "Conv", 1.0, kind, ("conv",))], costs or COSTS, {}, PEAKS)


def test_the_whole_model_reads_its_weights_and_inputs_once() -> None:
    profile = whole()
    assert profile.bytes == 100 + 999_900 + 50 + 50
    assert profile.operations == 1e6 + 100 + 2000
    assert profile.bound == "memory"
    assert profile.floor_seconds == pytest.approx(1_000_100 / PEAKS.memory(1_000_100))
    assert profile.seconds == 1.0


def test_the_whole_models_operations_take_the_type_they_run_in() -> None:
    small = replace(CONV, result=True)
    assert whole("float32", small).floor_seconds == pytest.approx(1e-3)
    assert whole("int8", small).floor_seconds == pytest.approx(0.25e-3)
    assert whole("int8", small).bound == "compute"


def test_a_model_of_one_batch_size_is_profiled_with_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "SECONDS", 0.01)
    x = torch.randn(4, 2, 4)
    exported = torch.export.export(nn.Sequential(nn.Flatten(), nn.Linear(8, 8)), (x,)).module()
    target, one = optc.Target(threads=1, batch=4), optc.Target(threads=1)
    made = optc.optimize(exported, x, "fuse", backend="eager", measure=False, target=target)
    assert not made.program.dynamic_batch
    artifact = load_artifact(made.save(tmp_path / "linear"))
    for profile in (program_layers(made.program, one, PEAKS), artifact_layers(artifact, one, PEAKS)):
        assert profile.operations == 2 * 4 * 8 * 8


def test_inputs_that_are_no_batch_are_profiled_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_times, "SECONDS", 0.01)

    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x @ mask

    program = optc.capture(Masked(), (torch.randn(2, 6), torch.randn(6, 6)), dynamic_batch=False)
    assert program_layers(program, optc.Target(threads=1), PEAKS).operations == 2 * 2 * 6 * 6


def test_without_costs_there_are_times_only() -> None:
    profile = profiled("net", [KernelTime("k", "Conv", 1.0, "float32", ("conv",))], (), {}, PEAKS)
    assert profile.seconds == 1.0
    assert (profile.operations, profile.bytes, profile.layers[0].bound) == (0, 0, "")


def test_bandwidth_lies_between_what_was_measured() -> None:
    assert PEAKS.memory(10) == pytest.approx(1e9)
    assert PEAKS.memory(1e12) == pytest.approx(1e8)
    assert PEAKS.memory(math.sqrt(1000 * 1e6)) == pytest.approx(math.sqrt(1e9 * 1e8))


def test_a_type_without_a_kernel_has_the_roof_of_float32_and_int4_that_of_int8() -> None:
    assert PEAKS.compute("float64") == 1e9
    assert PEAKS.compute("int4") == 4e9
