"""``optc.optimize``: the Python API end to end on a small real network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optc
from optc.contest import TemporaryFolder
from optc.errors import OptcError, PluginError, VerificationError
from optc.lowering.eager import EagerBackend
from optc.lowering.lowering import lower
from optc.machine import emulates_bf16, isa


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"scores": self.head(self.norm(self.conv(x)).relu().mean((2, 3)))}


ORT = {"backend": "onnxruntime"}


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(8, 3, 16, 16))  # gives the batch norm running statistics
    return net


def test_optimize_is_callable_like_the_module_and_saves(net: Net, tmp_path: Path) -> None:
    x = torch.randn(1, 3, 16, 16)
    seen: list[object] = []

    def metric(call: object) -> float:
        seen.append(call)
        return 0.5

    batches = [torch.randn(4, 3, 16, 16) for _ in range(4)]
    optimized = optc.optimize(net, x, ["fuse", "quant"], calibration=batches, evaluate=metric, measure=False, **ORT)
    assert net.training
    assert seen == [net, optimized]
    assert optimized.report.accuracy.before == 0.5
    assert optimized.report.calibration == "batches given by the caller"
    assert optimized.report.precision.startswith("int8 (2 of 2")
    y = torch.randn(5, 3, 16, 16)
    net.eval()
    expected, got = net(y)["scores"].detach(), optimized(y)["scores"]
    net.train()
    assert got.shape == (5, 10)
    assert float((got - expected).abs().max() / expected.abs().max()) < 0.1
    runner = optc.load(optimized.save(tmp_path / "artifact"))
    assert torch.equal(torch.from_numpy(runner(y.numpy())[0]), got)
    with pytest.raises(OptcError, match="exists"):
        optimized.save(tmp_path / "artifact")


def test_quant_without_calibration_is_one_line(net: Net) -> None:
    with pytest.raises(OptcError, match="calibration"):
        optc.optimize(net, torch.randn(1, 3, 16, 16), "quant", measure=False)


@pytest.mark.usefixtures("briefly")
def test_measurement_has_the_baselines_and_a_verdict(net: Net) -> None:
    optimized = optc.optimize(net, torch.randn(1, 3, 16, 16), "fuse", **ORT)
    measurement = optimized.report.measurement
    assert measurement is not None
    fourth = ["compile-fp32"] if emulates_bf16(isa()) else []
    assert [r.name for r in measurement.results] == ["eager-fp32", "eager-bf16", "compile-bf16", *fourth, "optc"]
    assert all(r.blocks for r in measurement.results if r.error is None)
    assert "best unquantized PyTorch" in optimized.report.verdict
    assert optimized.report.to_dict()["verdict"] == optimized.report.verdict


@pytest.mark.usefixtures("briefly")
def test_auto_keeps_the_fastest_backend_and_says_why(net: Net, tmp_path: Path) -> None:
    inputs = torch.randn(1, 3, 16, 16)
    optimized = optc.optimize(net, inputs, ["fuse"], measure=False, target=optc.Target(threads=1))
    outcomes = {outcome.backend: outcome for outcome in optimized.report.backends}
    assert {"eager", "onnxruntime"} <= outcomes.keys()
    kept = optimized.report.backends[0]
    assert kept.chosen
    assert optimized.report.backend == kept.backend
    assert all(outcome.reason for outcome in outcomes.values())
    if not kept.options:  # other options take the place of none only where they are shown to be faster
        rivals = [outcome for outcome in optimized.report.backends if not outcome.options]
        assert kept.p50_ms == min(outcome.p50_ms for outcome in rivals if outcome.p50_ms is not None)
    net.eval()
    expected = net(inputs)["scores"].detach()
    net.train()
    torch.testing.assert_close(optimized(inputs)["scores"], expected, rtol=1e-4, atol=1e-5)
    runner = optc.load(optimized.save(tmp_path / "artifact"))
    torch.testing.assert_close(torch.from_numpy(runner(inputs.numpy())[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("uncompiled")
def test_a_choice_is_measured_once_for_a_model_and_a_machine(
    net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inputs, target = torch.randn(1, 3, 16, 16), optc.Target(threads=1)

    def optimize() -> optc.Report:
        return optc.optimize(net, inputs, ["fuse"], measure=False, target=target).report

    first, second = optimize(), optimize()
    assert second.backends == first.backends
    assert second.backend == first.backend
    assert "Measuring with MLPerf LoadGen" in first.seconds.keys() - second.seconds.keys()
    (note,) = set(second.notes) - set(first.notes)
    assert Path(note.rpartition("delete ")[2]).is_file()


@pytest.mark.usefixtures("uncompiled", "briefly")
def test_inputs_in_a_type_that_numpy_lacks_have_their_baselines() -> None:
    made = optc.optimize(nn.Linear(64, 64).bfloat16(), torch.randn(1, 64).bfloat16(), "fuse", backend="eager")
    assert made.report.measurement is not None
    failed = {result.name: result.error for result in made.report.measurement.results if result.error}
    assert {name for name, why in failed.items() if "emulates" not in why} == set()


@pytest.mark.gpu
def test_a_model_on_a_gpu_keeps_a_budget(net: Net) -> None:
    moved, inputs = copy.deepcopy(net).cuda(), torch.randn(1, 3, 16, 16, device="cuda")
    batches = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    given = {"calibration": batches, "measure": False, "max_drop": 50.0, **ORT}
    assert optc.optimize(moved, inputs, "fuse,quant", **given).report.accuracy.after is not None

    def evaluate(call: Callable[..., Any]) -> float:
        return float(len(call(batches[0].cuda())["scores"]) == 4)

    assert optc.optimize(moved, inputs, "fuse,quant", evaluate=evaluate, **given).report.accuracy.before == 1.0


@pytest.mark.gpu
def test_a_model_on_a_gpu_stays_there_and_a_copy_is_optimized(net: Net) -> None:
    moved = copy.deepcopy(net).cuda()
    inputs = torch.randn(1, 3, 16, 16, device="cuda")
    batches = [torch.randn(4, 3, 16, 16, device=device) for device in ("cpu", "cuda")]
    made = optc.optimize(moved, inputs, "fuse,quant", calibration=batches, measure=False, **ORT)
    assert {parameter.device.type for parameter in moved.parameters()} == {"cuda"}
    moved.eval()
    torch.testing.assert_close(made(inputs)["scores"], moved(inputs)["scores"].detach().cpu(), rtol=0.1, atol=0.1)


class Broken(nn.Module):
    """NaN in a weight, which a fused rectifier may take for zero."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 4) if mixes else nn.Identity()
        with torch.no_grad():
            self.conv.weight[0] = float("nan")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


@pytest.mark.parametrize("backend", ["eager", "onnxruntime"])
def test_a_model_that_is_nan_throughout_is_not_optimized(backend: str) -> None:
    message = "output 0 of the model itself is NaN throughout on the verification inputs — check its weights"
    with pytest.raises(VerificationError, match=message):
        optc.optimize(Broken(mixes=True), torch.randn(2, 3, 8, 8), "fuse", backend=backend, measure=False)


def test_of_a_model_that_is_nan_in_part_that_is_told() -> None:
    optimized = optc.optimize(Broken(mixes=False), torch.randn(2, 3, 8, 8), "fuse", backend="eager", measure=False)
    assert any(note.startswith("25.0% of output 0 of the model itself are NaN") for note in optimized.report.notes)


class Halves(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.bfloat16() * 2, x.sum()


def test_outputs_have_the_types_and_shapes_of_the_model() -> None:
    x = torch.randn(2, 3)
    optimized = optc.optimize(Halves(), x, "fuse", backend="eager", measure=False)
    twice, total = optimized(x)
    assert (twice.dtype, total.shape) == (torch.bfloat16, ())
    torch.testing.assert_close(twice, x.bfloat16() * 2)
    torch.testing.assert_close(optimized(x.numpy())[1], x.sum())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"passes": None}, "passes are None — give names as in"),
        ({"passes": [object()]}, "passes are "),
        ({"max_drop": -1.0}, "max_drop is -1 — give percentage points"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"evaluate": lambda call: None}, "the accuracy of the model came out as None — return a number from 0 to 1"),
        ({"evaluate": lambda call: 90.0}, "the accuracy of the model came out as 90.0"),
        ({"verification": torch.randn(2, 3, 8, 8)}, "verification batch 1"),
    ],
    ids=["no passes", "no pass", "negative", "nan", "nothing", "percent", "tensor"],
)
def test_arguments_that_make_no_sense_are_told(net: Net, given: dict[str, Any], message: str) -> None:
    arguments = {"passes": "fuse", "backend": "eager", "measure": False, **given}
    with pytest.raises(OptcError) as caught:
        optc.optimize(net, torch.randn(2, 3, 8, 8), **arguments)
    assert message in str(caught.value)


class Stumbling(EagerBackend):
    """Loads what cannot answer queries of more than two samples, and cannot be closed."""

    name, origin = "stumbling", "a-plugin"

    def load(self, folder: Path, files: tuple[str, ...], target: optc.Target) -> optc.Runner:
        return StumblingRunner(super().load(folder, files, target))


class StumblingRunner(optc.Runner):
    def __init__(self, inner: optc.Runner) -> None:
        self.inner, self.provider, self.precision = inner, inner.provider, inner.precision
        self.closes = True

    def __call__(self, *inputs: Any) -> Any:
        if len(inputs[0]) > 2:
            self.closes = False
            raise ValueError("no")
        return self.inner(*inputs)

    def close(self) -> None:
        self.inner.close()
        if not self.closes:
            raise ValueError("stuck")


def test_a_backend_that_fails_when_it_is_called_or_closed_is_named(net: Net) -> None:
    program = optc.capture(net.eval(), (torch.randn(2, 3, 16, 16),))
    folder = TemporaryFolder()
    lowering = lower(Stumbling(), program, optc.Target(threads=1), folder.path / "x")
    optimized = optc.Optimized(program, lowering, folder)
    assert optimized(torch.randn(2, 3, 16, 16))["scores"].shape[0] == 2
    with pytest.raises(PluginError, match=r"backend 'stumbling' \(from a-plugin\) raised ValueError: no"):
        optimized(torch.randn(3, 3, 16, 16))
    with pytest.raises(PluginError, match=r"backend 'stumbling' \(from a-plugin\) raised ValueError: stuck"):
        optimized.close()
