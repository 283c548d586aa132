from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import optc
from optc_openvino.attention import spell_out_attention, split_projections
from optc_openvino.execution import kernels
from optc_openvino.graph import drop_repeated_quantizations, drop_zero_points
from optc_openvino.runner import OpenVinoRunner
from optc_openvino.runtime import OpenVinoOptions, compile_model, ov, read

TARGET = optc.Target(threads=2)
BATCH, TOKENS, HEADS, WIDTH = 2, 5, 3, 8


@pytest.mark.parametrize("which", ["vit", "vit_int8"])
def test_rewriting_changes_kernels_and_no_output(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made: optc.Optimized = request.getfixturevalue(which)
    optc.export_onnx(made.program, tmp_path / "model.onnx")
    model, plain = read(tmp_path / "model.onnx"), read(tmp_path / "model.onnx")
    for each in (model, plain):
        drop_zero_points(each)
    drop_repeated_quantizations(model)
    assert (spell_out_attention(model), split_projections(model)) == (12, 12)
    assert (spell_out_attention(model), split_projections(model)) == (0, 0)
    assert {len(node.get_output_partial_shape(0)) for node in model.get_ops() if _rounds_queries(node)} <= {3}
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (ours,), (reference,) = OpenVinoRunner(model, TARGET)(x), OpenVinoRunner(plain, TARGET)(x)
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-4)
    before, after = (_transpositions(each) for each in (plain, model))
    assert max(before) == 5
    assert max(after, default=0) < 5


def _rounds_queries(node: ov.Node) -> bool:
    """Whether a node quantizes a query, a key or a value."""
    kinds = [node.get_type_name(), *(value.get_node().get_friendly_name() for value in node.input_values()[:1])]
    return kinds[0] == "FakeQuantize" and ("unbind" in kinds[1] or "/" in kinds[1])


def _transpositions(model: ov.Model) -> list[int]:
    """How many dimensions each transposition of activations in the execution graph has."""
    model.reshape([1, 3, 224, 224])
    nodes = compile_model(model, TARGET, OpenVinoOptions()).get_runtime_model().get_ordered_ops()
    moved = [node for node in nodes if str(node.get_rt_info()["layerType"].value) == "Transpose"]
    return [len(node.get_output_partial_shape(0)) for node in moved]


def test_a_projection_in_parts_is_one_layer(vit: optc.Optimized, vit_int8: optc.Optimized) -> None:
    for made, kind in ((vit, "float32"), (vit_int8, "int8 (50 of 50 layers)")):
        runner = made.load()
        assert isinstance(runner, OpenVinoRunner)
        assert runner.precision == kind
        layers = [kernel for kernel in runner.kernels if kernel.is_layer]
        assert len(layers) == 50 + 2 * 12
        assert sum(kernel.name.startswith("node_linear/") for kernel in layers) == 3
        runner.close()
    assert vit_int8.details["not_int8"] == {}


class Attention(nn.Module):
    """Self-attention as timm writes it, but for what the tests vary."""

    def __init__(self, bias: bool, order: tuple[int, ...]) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH, bias=bias)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, WIDTH).permute(self.order)
        query, key, value = parts.unbind(0)
        return functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("order", "found"), [((2, 0, 3, 1, 4), 1), ((2, 0, 1, 3, 4), 0)])
@pytest.mark.parametrize("passes", ["fuse", "bf16"])
def test_projections_are_split_where_heads_come_first(
    bias: bool, order: tuple[int, ...], found: int, passes: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(BATCH, TOKENS, HEADS * WIDTH)
    made = optc.optimize(Attention(bias, order).eval(), x, passes, backend="eager", measure=False, target=TARGET)
    optc.export_onnx(made.program, tmp_path / "model.onnx")
    model = read(tmp_path / "model.onnx")
    (before,) = OpenVinoRunner(model.clone(), TARGET)(x.numpy())
    assert split_projections(model) == found
    (after,) = OpenVinoRunner(model, TARGET)(x.numpy())
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=2**-7 if passes == "bf16" else 1e-5)


def test_weights_of_half_a_byte_stay_whole() -> None:
    ops = ov.opset13
    x = ops.parameter([BATCH, TOKENS, HEADS * WIDTH], np.float32)
    numbers = np.random.default_rng(0).integers(-8, 8, (3 * HEADS * WIDTH, HEADS * WIDTH))
    for kind, found in ((ov.Type.i4, 0), (ov.Type.i8, 1)):
        weights = ops.multiply(ops.convert(ops.constant(numbers, kind), "f32"), ops.constant(np.float32(0.01)))
        view = ops.reshape(ops.matmul(x, weights, False, True), ops.constant([0, 0, 3, HEADS, WIDTH]), True)
        parts = ops.transpose(view, ops.constant([2, 0, 3, 1, 4]))
        taken = [ops.slice(parts, *(ops.constant([at]) for at in (number, number + 1, 1, 0))) for number in range(3)]
        query, key, value = (ops.squeeze(each, ops.constant([0])) for each in taken)
        model = ov.Model([ops.scaled_dot_product_attention(query, key, value)], [x])
        assert split_projections(model) == found


@pytest.mark.parametrize(("case", "found"), [("plain", 1), ("no mask", 1), ("mask", 0), ("causal", 0), ("scale", 0)])
def test_attention_is_spelt_out_where_it_is_plain(case: str, found: int) -> None:
    ops = ov.opset13
    inputs = [ops.parameter([BATCH, HEADS, TOKENS, WIDTH], np.float32) for _ in range(3)]
    mask = np.zeros((), np.float32) if case != "mask" else np.triu(np.full((TOKENS, TOKENS), -9, np.float32), 1)
    further = [ops.constant(mask)] if case in ("no mask", "mask", "scale") else []
    further += [ops.constant(np.float32(0.5))] if case == "scale" else []
    attention = ops.scaled_dot_product_attention(*inputs, *further, causal=case == "causal")
    model = ov.Model([attention], inputs)
    noise = np.random.default_rng(0)
    arrays = [noise.standard_normal((BATCH, HEADS, TOKENS, WIDTH)).astype(np.float32) for _ in inputs]
    (before,) = OpenVinoRunner(model.clone(), TARGET)(*arrays)
    assert spell_out_attention(model) == found
    (after,) = OpenVinoRunner(model, TARGET)(*arrays)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    assert kernels(compile_model(model, TARGET, OpenVinoOptions()))
