from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import optc
from optc_openvino.attention import spell_out_attention, split_projections
from optc_openvino.graph import drop_repeated_quantizations, drop_zero_points
from optc_openvino.runner import OpenVinoRunner
from optc_openvino.runtime import OpenVinoOptions, compile_model, ov, read
from optc_openvino.times import kernel_times

TARGET = optc.Target(threads=2)
Rounded = Callable[[ov.Node, float, int], ov.Node]
BATCH, TOKENS, HEADS, WIDTH = 2, 5, 3, 8


@pytest.mark.parametrize(("which", "rounded"), [("vit", 0), ("vit_int8", 8)])
def test_rewriting_changes_kernels_and_no_output(
    which: str, rounded: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made: optc.Optimized = request.getfixturevalue(which)
    optc.export_onnx(made.program, tmp_path / "model.onnx")
    model, plain = read(tmp_path / "model.onnx"), read(tmp_path / "model.onnx")
    for each in (model, plain):
        drop_zero_points(each)
    drop_repeated_quantizations(model)
    assert (spell_out_attention(model), split_projections(model)) == (4, 4)
    assert (spell_out_attention(model), split_projections(model)) == (0, 0)
    sources = [node.input_value(0) for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]
    at_layers = [value for value in sources if re.search(r"/\d$", value.get_node().get_friendly_name())]
    assert len(at_layers) == rounded  # of queries and keys, before they are rearranged
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (ours,), (reference,) = OpenVinoRunner(model, TARGET)(x), OpenVinoRunner(plain, TARGET)(x)
    np.testing.assert_allclose(ours, reference, rtol=1e-4, atol=1e-4)
    before, after = (_transpositions(each) for each in (plain, model))
    assert max(before) == 5
    assert max(after, default=0) < 5


def _transpositions(model: ov.Model) -> list[int]:
    """How many dimensions each transposition of activations in the execution graph has."""
    model.reshape([1, 3, 224, 224])
    nodes = compile_model(model, TARGET, OpenVinoOptions()).get_runtime_model().get_ordered_ops()
    moved = [node for node in nodes if str(node.get_rt_info()["layerType"].value) == "Transpose"]
    return [len(node.get_output_partial_shape(0)) for node in moved]


def test_a_projection_in_parts_is_one_layer(vit: optc.Optimized, vit_int8: optc.Optimized) -> None:
    for made, kind in ((vit, "float32"), (vit_int8, "int8 (18 of 18 layers)")):
        runner = made.load()
        assert isinstance(runner, OpenVinoRunner)
        assert runner.precision == kind
        layers = [kernel for kernel in runner.kernels if kernel.is_layer]
        assert len(layers) == 18 + 2 * 4
        assert sum(kernel.name.startswith("node_linear/") for kernel in layers) == 3
        runner.close()
    assert vit_int8.details["not_int8"] == {}


def test_the_parts_of_a_projection_take_one_time(vit_int8: optc.Optimized) -> None:
    model, image = vit_int8.files[0], np.zeros((1, 3, 224, 224), np.float32)
    layers = [
        time
        for time in kernel_times(read(model), TARGET, OpenVinoOptions(), [image])
        if time.operator.startswith(("FullyConnected", "Convolution"))
    ]
    assert len({time.name for time in layers}) == len(layers) == 18
    seconds = {time.name: time.seconds for time in layers}
    names = ["node_linear", *(f"node_linear_{number}" for number in range(1, 16))]
    projections, outputs = names[0::4], names[1::4]  # of each block; the second does a third of the first's work
    assert all(time.name in time.nodes for time in layers if time.name in names), "however OpenVINO calls them"
    assert median(map(seconds.__getitem__, projections)) > 1.5 * median(map(seconds.__getitem__, outputs))


class Attention(nn.Module):
    """Self-attention as timm writes it, but for what the tests vary."""

    def __init__(self, bias: bool, order: tuple[int, ...], unbind: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH, bias=bias)
        self.order, self.unbind = order, unbind

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(x.shape[0], TOKENS, 3, HEADS, WIDTH).permute(self.order)
        query, key, value = parts.unbind(0) if self.unbind else (parts[0], parts[1], parts[2])
        return functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize(("bias", "unbind"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize(("order", "found"), [((2, 0, 3, 1, 4), 1), ((2, 0, 1, 3, 4), 0)])
@pytest.mark.parametrize("passes", ["fuse", "bf16"])
def test_projections_are_split_where_heads_come_first(
    bias: bool, unbind: bool, order: tuple[int, ...], found: int, passes: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x, module = torch.randn(BATCH, TOKENS, HEADS * WIDTH), Attention(bias, order, unbind).eval()
    made = optc.optimize(module, x, passes, backend="eager", measure=False, target=TARGET)
    optc.export_onnx(made.program, tmp_path / "model.onnx")
    model = read(tmp_path / "model.onnx")
    (before,) = OpenVinoRunner(model.clone(), TARGET)(x.numpy())
    assert split_projections(model) == found
    (after,) = OpenVinoRunner(model, TARGET)(x.numpy())
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=2**-7 if passes == "bf16" else 1e-5)


def projection(case: str, rounded: Rounded) -> ov.Model:
    """A quantized projection of a batch of one size, its parts added up, in one of several forms."""
    ops, noise = ov.opset13, np.random.default_rng(0)
    size, kind = HEADS * WIDTH, ov.Type.i4 if case == "half a byte" else ov.Type.i8
    x = ops.parameter([BATCH, TOKENS, size], np.float32)
    scales = ops.constant(noise.uniform(0.01, 0.02, (3 * size, 1)).astype(np.float32))
    weights = ops.multiply(ops.convert(ops.constant(noise.integers(-8, 8, (3 * size, size)), kind), "f32"), scales)
    layer = ops.matmul(x, weights, False, True)
    # With "twice the tokens" a token's three parts are not those of one row of the layer's output.
    shape = [0, -1, 3, HEADS, WIDTH // 2] if case == "twice the tokens" else [0, 0, 3, HEADS, WIDTH]
    view = ops.reshape(layer, ops.constant(shape), True)
    whole = ops.transpose(view, ops.constant([2, 0, 3, 1, 4]))
    parts = []
    for number in range(2 if case == "two parts" else 3):
        starts, ends, axes = [number], [number + 1], [0]
        if case == "two axes":
            starts, ends, axes = [0, *starts], [TOKENS, *ends], [3, *axes]
        taken = ops.slice(whole, *(ops.constant(each) for each in (starts, ends, [1] * len(axes), axes)))
        taken = ops.squeeze(taken, ops.constant([0]))
        parts.append(rounded(taken, 0.03, 120) if number < 2 else taken)
    total = parts[0]
    for each in parts[1:]:
        total = ops.add(total, each)
    results = [total, view] if case == "read twice" else [total]
    return ov.Model(results, [x])


@pytest.mark.parametrize(
    ("case", "found"),
    [
        ("three parts", 1),
        ("two parts", 1),
        ("half a byte", 0),
        ("read twice", 0),
        ("two axes", 0),
        ("twice the tokens", 0),
    ],
)
def test_a_quantized_projection_stays_the_same(case: str, found: int, rounded: Rounded) -> None:
    model = projection(case, rounded)
    x = np.random.default_rng(1).standard_normal((BATCH, TOKENS, HEADS * WIDTH)).astype(np.float32)
    before = OpenVinoRunner(model.clone(), TARGET)(x)
    assert split_projections(model) == found
    for ours, reference in zip(OpenVinoRunner(model, TARGET)(x), before, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "found"), [("plain", 1), ("no mask", 1), ("mask", 0), ("hidden", 0), ("causal", 0), ("scale", 0)]
)
def test_attention_is_spelt_out_where_it_is_plain(case: str, found: int) -> None:
    ops = ov.opset13
    inputs = [ops.parameter([BATCH, HEADS, TOKENS, WIDTH], np.float32) for _ in range(3)]
    mask = np.zeros((), np.float32) if case != "mask" else np.triu(np.full((TOKENS, TOKENS), -9, np.float32), 1)
    further = [ops.constant(mask)] if case in ("no mask", "mask", "scale") else []
    further += [ops.constant(np.zeros((TOKENS, TOKENS), bool))] if case == "hidden" else []
    further += [ops.constant(np.float32(0.5))] if case == "scale" else []
    attention = ops.scaled_dot_product_attention(*inputs, *further, causal=case == "causal")
    model = ov.Model([attention], inputs)
    noise = np.random.default_rng(0)
    arrays = [noise.standard_normal((BATCH, HEADS, TOKENS, WIDTH)).astype(np.float32) for _ in inputs]
    (before,) = OpenVinoRunner(model.clone(), TARGET)(*arrays)
    assert spell_out_attention(model) == found
    (after,) = OpenVinoRunner(model, TARGET)(*arrays)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
