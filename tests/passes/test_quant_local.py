"""Formats of one layer alone: half precision and int8 with ranges found at run time; and what each stores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import optc
from optc import BackendError, PassContext, Target
from optc.lowering.lowering import lower
from optc.lowering.onnxruntime import OnnxRuntimeBackend
from optc.plugins.registry import registry
from optc.rewrite import complete_meta
from optc_passes.activation_fusion import FuseActivation
from optc_passes.observers import ActivationObserver
from optc_passes.quant import Quant
from optc_passes.quant_account import stored_bytes
from optc_passes.quant_formats import LayerFormats
from optc_passes.quant_local import DynamicInt8, Half

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.a = nn.Conv2d(3, 16, 3), nn.Linear(576, 128)
        self.b, self.c = nn.Linear(128, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.a(self.conv(x).relu().flatten(1)))
        return self.c(self.b(x).relu())


class Batches:
    description = "noise"

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(torch.randn(8, 3, 8, 8),)])


def prepared(fused: bool = False) -> LayerFormats:
    program = optc.capture(Net().eval(), (X,))
    if fused:
        program = FuseActivation()(program).program
    context = PassContext(Target(threads=1), Batches())
    layers = LayerFormats(program, context, ActivationObserver)
    layers.calibrate(context)
    return layers


def decibel(want: Tensor, got: Tensor) -> float:
    return float(20 * torch.log10(want.norm() / (got - want).norm()))


def test_dynamic_ranges_keep_the_model_at_any_batch(quantized: Callable) -> None:
    q = quantized(Net().eval(), X, formats="int8-dynamic")
    assert [change.node for change in q.result.applied] == ["linear", "linear_1", "linear_2"]
    assert q.reasons == {"conv2d": "runtimes find ranges at run time for matrix products only"}
    assert q.sqnr_db > 30
    loud = 1e4 * torch.randn(5, 3, 8, 8)  # no range was calibrated, so none can be left
    assert decibel(q.before.run(loud)[0], q.program.run(loud)[0]) > 30
    assert not Quant(formats="int8-dynamic")(q.program, PassContext(calibration=Batches())).modified


def test_onnxruntime_runs_dynamic_int8_as_one_kernel_a_layer(tmp_path: Path) -> None:
    program = Quant(formats="int8-dynamic")(
        optc.capture(Net().eval(), (X,)), PassContext(calibration=Batches())
    ).program
    backend = OnnxRuntimeBackend()
    lowered = backend.lower(program, Target(threads=1), tmp_path)
    runner = backend.load(tmp_path, lowered.files, Target(threads=1))
    assert runner.precision == "int8 (3 of 4 layers, 1 float32)"
    assert set(lowered.details["not_int8"]) == {"conv2d (conv)"}
    x = torch.randn(5, 3, 8, 8)
    assert decibel(program.run(x)[0], torch.from_numpy(runner(x.numpy())[0])) > 30


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("form", "least_db"), [("bf16", 38.0), ("fp16", 58.0)])
def test_half_precision_layer_by_layer(form: str, least_db: float, fused: bool) -> None:
    layers = prepared(fused)
    attempt = layers.attempt(dict.fromkeys(layers.names, form))
    assert len(attempt.layers) == 4
    assert attempt.sqnr > least_db
    complete_meta(attempt.program)
    attempt.program.graph.lint()
    assert {node.meta["val"].dtype for node in attempt.program.graph.nodes if node.name in layers.names} == {
        torch.bfloat16 if form == "bf16" else torch.float16
    }


@pytest.mark.parametrize("between", [nn.Identity(), nn.MaxPool2d(2)], ids=["directly", "max-pool"])
@pytest.mark.parametrize("form", ["bf16", "fp16"])
def test_int8_behind_half_precision_rounds_by_the_range_that_calibration_saw(form: str, between: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), between, nn.Conv2d(16, 8, 3)).eval()
    program = FuseActivation()(optc.capture(model, (X,))).program
    context = PassContext(Target(threads=1), Batches())
    layers = LayerFormats(program, context, ActivationObserver)
    layers.calibrate(context)
    first, second = layers.names
    assert layers.attempt({first: form, second: "int8"}).sqnr > 30


def test_layers_of_every_format_in_one_program(tmp_path: Path) -> None:
    layers = prepared(fused=True)
    formats = dict(zip(layers.names, ("int8", "fp16", "int8-dynamic", "int4-weights"), strict=True))
    attempt = layers.attempt(formats)
    assert {change.node: change.rule for change in attempt.layers} == formats
    complete_meta(attempt.program)
    x = torch.randn(5, 3, 8, 8)
    want = attempt.program.run(x)[0]
    for name in ("eager", "onnxruntime"):
        backend = registry().load("backend", name)()
        runner = lower(backend, attempt.program, Target(threads=1), tmp_path / name).load()
        assert decibel(want, torch.from_numpy(runner(x.numpy())[0])) > 30
        runner.close()


def test_a_runtime_without_a_kernel_says_so(tmp_path: Path) -> None:
    """So auto sees that onnxruntime has no bfloat16 convolution on a CPU, instead of believing that it does."""
    layers = prepared()
    attempt = layers.attempt({"conv2d": "bf16"})
    complete_meta(attempt.program)
    with pytest.raises(BackendError):
        lower(OnnxRuntimeBackend(), attempt.program, Target(threads=1), tmp_path / "bf16")


@pytest.mark.parametrize("form", ["float", "int8", "fp16", "bf16", "int8-dynamic", "int8-weights", "int4-weights"])
def test_the_bytes_of_the_account_are_those_stored(form: str) -> None:
    layers = prepared()
    layer = layers.plan.layers[1]
    program = layers.alone(layer, form, 1)
    stored = sum(tensor.nbytes / (2 if "_int4" in name else 1) for name, tensor in program.constants())
    assert stored_bytes(layers, layer, form) == pytest.approx(stored, rel=0.02)


def test_weights_that_float16_cannot_hold_are_refused() -> None:
    program = optc.capture(nn.Linear(32, 4), (torch.randn(2, 32),))
    node = next(node for node in program.graph.nodes if node.op == "call_function")
    weight = torch.full((4, 32), 1e5)
    assert Half(torch.float16).refusal(node, weight) == "its weights reach 1e+05, which fp16 cannot hold"
    assert Half(torch.bfloat16).refusal(node, weight) is None


def test_dynamic_int8_weights_keep_to_the_kernels_limit() -> None:
    integers, scale = DynamicInt8(64).rounded(torch.empty(0), torch.randn(8, 32))
    assert integers.dtype == torch.int8
    assert int(integers.abs().max()) == 64
    assert scale.shape == (8,)


@pytest.mark.parametrize(("given", "block"), [("32", 32), (64, 64), (None, 128), ("256", 256)])
def test_blocks_have_the_size_asked_for(quantized: Callable, given: str | int | None, block: int) -> None:
    q = quantized(nn.Linear(256, 32), torch.randn(2, 256), formats="int4-weights", block=given)
    assert q.result.applied[0].detail == f"weight in blocks of {block}"
