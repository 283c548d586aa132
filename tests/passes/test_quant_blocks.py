"""Block-wise weights: rounding, the graph, the ONNX file, the kernels that run it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import optc
from optc import PassContext, Target
from optc.lowering.onnxruntime import OnnxRuntimeBackend
from optc.rewrite import complete_meta
from optc_passes.observers import ActivationObserver
from optc_passes.quant import Quant
from optc_passes.quant_blocks import BlockFormat, dequantized, round_blocks
from optc_passes.quant_formats import LayerFormats
from optc_passes.quant_gptq import round_gptq

X = torch.randn(2, 3, 8, 8)


class Batches:
    """Calibration data."""

    description = "noise"

    def __init__(self, batches: list[Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return iter([(batch,) for batch in self.batches])


class Net(nn.Module):
    """A convolution, linear layers with and without what may be fused into them, and one no block divides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.a, self.b, self.c = nn.Linear(576, 128), nn.Linear(128, 100), nn.Linear(100, 64)
        self.d = nn.Linear(64, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(nn.functional.max_pool2d(self.conv(x).relu(), 1).flatten(1)).relu()
        return self.d(nn.functional.gelu(self.c(self.b(x))))


@pytest.mark.parametrize(("bits", "least_db"), [(4, 17), (8, 40)])
def test_blocks_round_to_their_limits(bits: int, least_db: float) -> None:
    weight = torch.randn(40, 384) * torch.logspace(-4, 2, 40).unsqueeze(1)
    weight[3] = 0
    form = BlockFormat(bits)
    integers, scales = round_blocks(weight, form)
    assert integers.dtype == torch.int8
    assert scales.shape == (40, 3)
    low, high = form.limits
    assert low <= int(integers.min())
    assert int(integers.max()) <= high
    error = dequantized(integers, scales) - weight
    rows = 10 * torch.log10(weight.square().sum(1) / error.square().sum(1))
    assert not bool(error[3].any())
    assert float(rows[torch.arange(40) != 3].min()) > least_db


def test_clipping_is_no_worse_than_none() -> None:
    weight = torch.randn(64, 256) ** 3
    integers, scales = round_blocks(weight, BlockFormat(4))
    peak = weight.reshape(64, -1, 128).abs().amax(-1, keepdim=True) / 7
    plain = (weight.reshape(64, -1, 128) / peak).round() * peak
    assert (dequantized(integers, scales) - weight).norm() < (plain.reshape(64, 256) - weight).norm()


@pytest.mark.parametrize(("width", "block"), [(4096, 128), (192, 64), (96, 32), (100, None), (48, None)])
def test_a_block_divides_the_inputs(width: int, block: int | None) -> None:
    assert BlockFormat(4).block_of(width) == block


@pytest.mark.parametrize(("form", "least_db"), [("int4-weights", 14.0), ("int8-weights", 38.0)])
def test_the_graph_keeps_the_model(quantized: Callable, form: str, least_db: float) -> None:
    q = quantized(Net(), X, formats=form)
    assert [(change.rule, change.detail) for change in q.result.applied] == [
        (form, "a.weight in blocks of 64"),
        (form, "b.weight in blocks of 128"),
        (form, "d.weight in blocks of 64"),
    ]
    assert q.reasons == {
        "conv2d": "runtimes have block-wise weights for matrix products only",
        "linear_2": "its 100 inputs do not divide into blocks of 32 or more",
    }
    assert q.sqnr_db > least_db
    again = Quant(formats=form)(q.program)
    assert not again.modified
    assert {skip.reason for skip in again.skipped} >= {"its weight is quantized already"}


def test_weights_alone_need_no_calibration() -> None:
    result = Quant(formats="int4-weights")(optc.capture(Net().eval(), (X,)))
    assert result.modified
    assert result.program.dynamic_batch


@pytest.mark.parametrize(
    ("form", "stored", "precision"),
    [
        ("int4-weights", onnx.TensorProto.INT4, "int4 (3 of 5 layers, 2 float32)"),
        ("int8-weights", onnx.TensorProto.INT8, "int8 (3 of 5 layers, 2 float32)"),
    ],
)
def test_onnxruntime_runs_one_kernel_a_layer(form: str, stored: int, precision: str, tmp_path: Path) -> None:
    program = Quant(formats=form)(optc.capture(Net().eval(), (X,))).program
    backend = OnnxRuntimeBackend()
    lowered = backend.lower(program, Target(threads=1), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert sum(tensor.data_type == stored for tensor in graph.initializer) == 3
    runner = backend.load(tmp_path, lowered.files, Target(threads=1))
    assert runner.precision == precision
    assert sum(kernel.operator == "MatMulNBits" for kernel in runner.kernels) == 3
    assert set(lowered.details["not_int8"]) == {"conv2d (conv)", "linear_2 (c)"}
    x = torch.randn(5, *X.shape[1:])
    (got,), want = runner(x.numpy()), program.run(x)[0]
    error = torch.from_numpy(got) - want
    assert 20 * torch.log10(want.norm() / error.norm()) > 30


def test_blocks_behind_int8_still_run_one_kernel(tmp_path: Path) -> None:
    """What a product with blocks reads may come from an int8 convolution, through a view."""
    program = optc.capture(Net().eval(), (X,))
    context = PassContext(Target(threads=1), Batches([torch.randn(8, 3, 8, 8)]))
    layers = LayerFormats(program, context, ActivationObserver)
    layers.calibrate(context)
    formats = dict.fromkeys(layers.names, "int8") | {"linear": "int4-weights", "linear_3": "int8-weights"}
    attempt = layers.attempt(formats)
    assert {change.node: change.rule for change in attempt.layers} == formats
    complete_meta(attempt.program)
    backend = OnnxRuntimeBackend()
    lowered = backend.lower(attempt.program, Target(threads=1), tmp_path)
    runner = backend.load(tmp_path, lowered.files, Target(threads=1))
    assert runner.precision == "int4 (1 of 5 layers, 4 int8)"
    assert lowered.details["not_int8"] == {}


def test_gptq_where_inputs_are_nearly_dependent() -> None:
    """Channels that are copies of each other at very different scales: float32 cannot factor that Hessian as it is."""
    torch.manual_seed(0)
    inputs = torch.randn(512, 8).repeat(1, 16) * torch.logspace(-6, 4, 128)
    weight = torch.randn(16, 128) / torch.logspace(-6, 4, 128)
    form = BlockFormat(4, 32)
    integers, scales = round_gptq(weight, inputs, form)
    assert scales.isfinite().all()
    wanted = inputs @ weight.T
    (nearest, plain) = (
        (inputs @ dequantized(*each).T - wanted).norm() for each in (round_blocks(weight, form), (integers, scales))
    )
    assert plain < nearest


def test_without_data_nothing_is_fitted_to_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8))
    inputs = [(torch.randn(64, 32),), (1 + torch.randn(64, 32),)]
    program = optc.capture(model, inputs[0])
    made = [Quant(formats="int4-weights", block=32)(replace(program, example_inputs=each)) for each in inputs]
    one, other = (dict(each.program.constants()) for each in made)
    assert made[0].modified
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
