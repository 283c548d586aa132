"""How OpenVINO divides work among threads, and whether the other way is faster."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import optc
import optc_openvino.backend as backend_module
import optc_openvino.partitioner as partitioner_module
from optc_openvino.backend import OpenVinoBackend
from optc_openvino.partitioner import faster_partitioner
from optc_openvino.parts import compile_and_fill
from optc_openvino.runtime import PARTITIONER, OpenVinoOptions, ov, read

X = torch.randn(2, 197, 64)
TARGET = optc.Target(threads=2, batch=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layer as a ViT has them, lowered."""
    folder = tmp_path_factory.mktemp("layer")
    OpenVinoBackend().lower(optc.capture(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), (X,)), TARGET, folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> ov.Model:
    return read(folder / "model.xml")


def compiled_with(model: ov.Model, given: OpenVinoOptions) -> str:
    compiled, _ = compile_and_fill(model, TARGET, given)
    return str(compiled.get_property(PARTITIONER)).rpartition(".")[2]


def test_the_option_reaches_openvino(model: ov.Model) -> None:
    assert compiled_with(model, OpenVinoOptions(partitioner="auto")) == "AUTO"
    assert compiled_with(model, OpenVinoOptions(partitioner="static")) == "STATIC"
    assert compiled_with(model, OpenVinoOptions()) in ("AUTO", "STATIC")


@pytest.mark.parametrize(("gain", "found"), [(0.9, True), (0.99, False), (1.1, False)])
def test_the_other_one_is_taken_where_it_is_clearly_faster(
    gain: float, found: bool, model: ov.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = compiled_with(model, OpenVinoOptions())
    other = {"AUTO": "static", "STATIC": "auto"}[own]
    asked: list[str] = []

    def trial(model: ov.Model, target: optc.Target, given: OpenVinoOptions) -> tuple[str, float]:
        asked.append(given.partitioner)
        return own, gain if given.partitioner == other else 1.0

    monkeypatch.setattr(partitioner_module, "_trial", trial)
    assert faster_partitioner(model, TARGET, OpenVinoOptions()) == (other if found else None)
    rounds = 3 if gain < 1 else 1
    assert asked == ["default", other, other, "default", "default", other][: 2 * rounds], "which is first takes turns"


def test_a_slow_model_is_run_less(model: ov.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def trial(model: ov.Model, target: optc.Target, given: OpenVinoOptions) -> tuple[str, float]:
        runs.append(given.partitioner)
        return "STATIC", 0.5 if given.partitioner == "auto" else 1.0

    monkeypatch.setattr(partitioner_module, "_SECONDS", 0.0)
    monkeypatch.setattr(partitioner_module, "_trial", trial)
    assert faster_partitioner(model, TARGET, OpenVinoOptions()) == "auto"
    assert runs == ["default", "auto"]


def test_both_are_really_run(model: ov.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[str] = set()
    trial = partitioner_module._trial

    def noted(model: ov.Model, target: optc.Target, given: OpenVinoOptions) -> tuple[str, float]:
        found = trial(model, target, given)
        ran.add(found[0])
        assert found[1] > 0
        return found

    monkeypatch.setattr(partitioner_module, "_trial", noted)
    monkeypatch.setattr(partitioner_module, "_ROUND_SECONDS", 0.02)
    faster_partitioner(model, TARGET, OpenVinoOptions())
    assert ran == {"AUTO", "STATIC"}


def test_it_goes_with_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # as run.py does, and undone here
    target = optc.Target(threads=2, batch=2, options={"openvino": {"partitioner": "auto"}})
    made = optc.optimize(nn.Linear(64, 64).eval(), X, "fuse", backend="openvino", target=target, measure=False)
    artifact = made.save(tmp_path / "layer")
    script = runpy.run_path(str(artifact / "run.py"))
    compiled = script["load"](batch=2, threads=2)
    assert str(compiled.get_property(PARTITIONER)).endswith("AUTO")
    runner: Any = optc.load(artifact)
    expected = made.program.run(X)[0].numpy()
    for outputs in (runner(X.numpy()), script["run"](compiled, [X.numpy()])):
        np.testing.assert_allclose(outputs[0], expected, rtol=1e-4, atol=1e-5)


def test_streams_and_kernels_come_with_the_faster_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faster(model: ov.Model, target: optc.Target, given: OpenVinoOptions) -> str | None:
        return "auto" if given.streams == 2 else None

    kernels_of: list[OpenVinoOptions] = []

    def chosen(path: Path, target: optc.Target, given: OpenVinoOptions) -> dict[str, Any]:
        kernels_of.append(given)
        return {}

    monkeypatch.setattr(backend_module, "faster_partitioner", faster)
    monkeypatch.setattr(backend_module, "choose_kernels", chosen)
    lowered = optc.Lowered(("model.xml", "model.bin"), {"divisible": True})
    ((options, made),) = OpenVinoBackend().variants(lowered, TARGET, folder)
    assert options == {"streams": 2, "partitioner": "auto"}
    assert 'PARTITIONER = "AUTO"' in made.run_script
    assert [(given.streams, given.partitioner) for given in kernels_of] == [(2, "auto")]
    throughput = optc.Target(threads=2, batch=2, options={"openvino": {"hint": "throughput"}})
    assert OpenVinoBackend().variants(lowered, throughput, folder) == []
