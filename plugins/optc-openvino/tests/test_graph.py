from __future__ import annotations

import ast
from pathlib import Path

import numpy as np

import optc
import optc_openvino
from optc_openvino.graph import drop_zero_points, quantized_layers
from optc_openvino.runner import OpenVinoRunner
from optc_openvino.runtime import read

TARGET = optc.Target(threads=2)


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
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-5)


def test_other_zero_points_stay(tmp_path: Path) -> None:
    from optc_openvino.runtime import ov

    ops = ov.opset13
    weights = ops.constant(np.arange(12, dtype=np.int8).reshape(3, 4))
    for zero_point, drops in ((0, 1), (2, 0)):
        x = ops.parameter([1, 4], np.float32)
        shift = ops.convert(ops.constant(np.full((3, 1), zero_point, np.int8)), "f32")
        shifted = ops.subtract(ops.convert(weights, "f32"), shift)
        model = ov.Model([ops.matmul(x, shifted, False, True)], [x])
        assert drop_zero_points(model) == drops


def test_the_quantized_layers_are_those_of_the_program(vit: optc.Optimized, vit_int8: optc.Optimized) -> None:
    layers = quantized_layers(read(vit_int8.files[0]))
    assert len(layers) == len(set(layers.values())) == 50
    assert {"patch_embed.proj.weight", "head.weight"} <= set(layers.values())
    assert quantized_layers(read(vit.files[0])) == {}


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
