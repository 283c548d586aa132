from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optc
import optc_openvino
from optc.machine import isa
from optc_openvino.graph import (
    drop_repeated_quantizations,
    drop_zero_points,
    quantized_layers,
    use_hsigmoid,
    use_signed_activations,
    whole,
)
from optc_openvino.roundings import without_roundings_before_activations
from optc_openvino.runner import OpenVinoRunner
from optc_openvino.runtime import ov, read

TARGET = optc.Target(threads=2)
Rounded = Callable[[ov.Node, float, int], ov.Node]


def test_dropping_zero_points_changes_nothing_but_the_graph(alexnet_int8: optc.Optimized, tmp_path: Path) -> None:
    optc.export_onnx(alexnet_int8.program, tmp_path / "model.onnx")
    model, plain = read(tmp_path / "model.onnx"), read(tmp_path / "model.onnx")
    before = sum(node.get_type_name() == "Subtract" for node in model.get_ordered_ops())
    dropped = drop_zero_points(model)
    assert dropped >= 8
    assert sum(node.get_type_name() == "Subtract" for node in model.get_ordered_ops()) == before - dropped
    assert drop_zero_points(model) == 0
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (ours,), (reference,) = OpenVinoRunner(model, TARGET)(x), OpenVinoRunner(plain, TARGET)(x)
    if not {"avx512_vnni", "avx_vnni"}.isdisjoint(isa() or ()):
        np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5)
    # Without int8 instructions other kernels run, which round some values that lie between two steps the other way.
    assert np.square(ours - reference).sum() < 10**-4.5 * np.square(reference).sum()


def test_other_zero_points_stay(tmp_path: Path) -> None:
    ops = ov.opset13
    weights = ops.constant(np.arange(12, dtype=np.int8).reshape(3, 4))
    for zero_point, drops in ((0, 1), (2, 0)):
        x = ops.parameter([1, 4], np.float32)
        shift = ops.convert(ops.constant(np.full((3, 1), zero_point, np.int8)), "f32")
        shifted = ops.subtract(ops.convert(weights, "f32"), shift)
        model = ov.Model([ops.matmul(x, shifted, False, True)], [x])
        assert drop_zero_points(model) == drops


@pytest.mark.parametrize(("zero_point", "changed"), [(128, 1), (127, 0), (0, 0)])
def test_symmetric_activations_are_signed(zero_point: int, changed: int, rounded: Rounded) -> None:
    ops = ov.opset13
    x = ops.parameter([1, 3, 8, 8], np.float32)
    value = rounded(x, 0.05, zero_point)
    weight = np.random.default_rng(0).integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    kernel = ops.multiply(ops.convert(ops.constant(weight), "f32"), np.float32(0.01))
    model = ov.Model([ops.convolution(value, kernel, [1, 1], [1, 1], [1, 1], [1, 1])], [x])
    inputs = np.random.default_rng(1).uniform(-7, 7, (1, 3, 8, 8)).astype(np.float32)
    (before,) = OpenVinoRunner(model.clone(), TARGET)(inputs)
    assert use_signed_activations(model) == changed
    assert use_signed_activations(model) == 0
    stored = {node.get_output_element_type(0).get_type_name() for node in model.get_ops()}
    assert ("u8" not in stored) == bool(changed)
    (after,) = OpenVinoRunner(model, TARGET)(inputs)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["f32", "bf16"])
@pytest.mark.parametrize(("slope", "replaced"), [(1 / 6, 1), (0.2, 0)])
def test_pytorchs_hard_sigmoid_gets_a_kernel(kind: str, slope: float, replaced: int) -> None:
    ops = ov.opset13
    x = ops.parameter([2, 8], np.float32)
    slope_and_offset = (ops.constant(value, getattr(ov.Type, kind)) for value in (slope, 0.5))
    gate = ops.convert(ops.hard_sigmoid(ops.convert(x, kind), *slope_and_offset), "f32")
    model = ov.Model([gate], [x])
    values = np.linspace(-4, 4, 16, dtype=np.float32).reshape(2, 8)
    (before,) = OpenVinoRunner(model.clone(), TARGET)(values)
    assert use_hsigmoid(model) == replaced
    (after,) = OpenVinoRunner(model, TARGET)(values)
    np.testing.assert_allclose(after, before, atol=1e-6 if kind == "f32" else 2**-8)


class Activated(nn.Module):
    """Two convolutions with an activation between them."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3), activation, nn.Conv2d(16, 8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize(
    ("activation", "dropped"), [(nn.Hardswish(), 1), (nn.SiLU(), 1), (nn.ReLU(), 0), (nn.Identity(), 0)]
)
def test_the_rounding_before_an_activation_goes(activation: nn.Module, dropped: int) -> None:
    torch.manual_seed(0)
    module, x = Activated(activation).eval(), torch.randn(2, 3, 16, 16)
    made = optc.optimize(module, x, "fuse,quant", backend="openvino", calibration=[x] * 4, measure=False, target=TARGET)
    assert made.details["dropped_quantizations"] == dropped
    assert made.details["not_int8"] == {}
    fewer, count = without_roundings_before_activations(made.program)
    assert count == dropped
    (rounded,), (kept,) = made.program.run(x), fewer.run(x)
    exact = module(x).detach()
    assert (fewer is made.program) == (dropped == 0)
    assert dropped == 0 or (kept - exact).square().sum() < (rounded - exact).square().sum()
    (run,) = made.load()(x.numpy())
    np.testing.assert_allclose(run, kept.numpy(), atol=0.02)


def test_the_quantized_layers_are_those_of_the_program(vit: optc.Optimized, vit_int8: optc.Optimized) -> None:
    layers = quantized_layers(read(vit_int8.files[0]))
    assert len(layers) == len(set(layers.values())) == 18 + 2 * 4  # of the 4 projections, three parts each
    weights = {whole(name) for name in layers.values()}
    assert len(weights) == 18
    assert {"patch_embed.proj.weight", "head.weight", "blocks.0.attn.qkv.weight.T"} <= weights
    assert quantized_layers(read(vit.files[0])) == {}


@pytest.mark.parametrize(("second", "dropped"), [(0.05, 1), (0.04, 0)])
def test_a_value_that_is_only_moved_is_rounded_once(second: float, dropped: int, rounded: Rounded) -> None:
    ops = ov.opset13
    x = ops.parameter([1, 4, 6], np.float32)
    moved = ops.transpose(rounded(x, 0.05, 120), ops.constant(np.array([0, 2, 1], np.int64)))
    model = ov.Model([ops.relu(rounded(ops.reshape(moved, ops.constant([1, 24]), False), second, 120))], [x])
    inputs = np.random.default_rng(0).uniform(-8, 8, (1, 4, 6)).astype(np.float32)
    (before,) = OpenVinoRunner(model.clone(), TARGET)(inputs)
    assert drop_repeated_quantizations(model) == dropped
    assert sum(node.get_type_name() == "FakeQuantize" for node in model.get_ops()) == 2 - dropped
    (after,) = OpenVinoRunner(model, TARGET)(inputs)
    np.testing.assert_allclose(after, before, rtol=1e-6)


def test_only_public_names_of_optc_are_used() -> None:
    public = {"optc": set(optc.__all__), "optc.ops": None, "optc.rewrite": None}
    seen = set()
    for path in Path(optc_openvino.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "optc":
                assert node.module in public, f"{path.name} imports from {node.module}"
                names = public[node.module]
                assert names is None or {alias.name for alias in node.names} <= names, path.name
                seen |= {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] != "optc" for alias in node.names), path.name
    assert {"Backend", "export_onnx", "check_agreement"} <= seen
