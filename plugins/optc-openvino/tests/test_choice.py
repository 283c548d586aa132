"""Kernels of convolutions are chosen by measuring them, and are what runs."""

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
from optc_openvino import backend as backend_module
from optc_openvino.backend import OpenVinoBackend
from optc_openvino.choice import choose_kernels, recall_kernels, write_choice
from optc_openvino.execution import kernels
from optc_openvino.runtime import OpenVinoOptions, compile_model, read

SLOWEST = ("ref_any",)
"""What every convolution has, on every CPU."""
X = torch.randn(2, 32, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("optc_openvino.choice._ROUND_SECONDS", 0.05)  # the reference kernels are far slower


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=64), nn.ReLU())
    return nn.Sequential(*wide, nn.Conv2d(64, 64, 1)).eval()


@pytest.fixture(scope="module", params=[1, 2])
def target(request: pytest.FixtureRequest) -> optc.Target:
    return optc.Target(threads=2, batch=2, options={"openvino": {"streams": request.param}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convolutions")
    OpenVinoBackend().lower(optc.capture(convolutions(), (X,)), optc.Target(threads=2), path)
    return path


def primitives(folder: Path, file: str) -> dict[str, str]:
    model = read(folder / file, folder / "model.bin")
    model.reshape([2, 32, 28, 28])
    compiled = compile_model(model, optc.Target(threads=2), OpenVinoOptions())
    return {kernel.name: kernel.primitive for kernel in kernels(compiled) if kernel.is_layer}


def test_a_convolution_runs_the_kernel_that_is_written(folder: Path) -> None:
    before = primitives(folder, "model.xml")
    first, *others = before
    write_choice(folder / "model.xml", {first: SLOWEST}, folder / "one.xml")
    after = primitives(folder, "one.xml")
    assert after[first].startswith("ref")
    assert [after[name] for name in others] == [before[name] for name in others]
    assert len(others) == 2


def test_a_kernel_that_the_cpu_has_not_is_not_an_error(folder: Path) -> None:
    write_choice(folder / "model.xml", dict.fromkeys(primitives(folder, "model.xml"), ("acl",)), folder / "acl.xml")
    assert all(primitives(folder, "acl.xml").values())


def test_a_slow_kernel_is_replaced_and_the_rest_of_it_stays(folder: Path, target: optc.Target) -> None:
    first, *_ = primitives(folder, "model.xml")
    write_choice(folder / "model.xml", {first: SLOWEST}, folder / "slow.xml")
    (folder / "slow.bin").write_bytes((folder / "model.bin").read_bytes())
    chosen = choose_kernels(folder / "slow.xml", target, OpenVinoBackend.options(target))
    assert first in chosen
    write_choice(folder / "slow.xml", chosen, folder / "mended.xml")
    assert not primitives(folder, "mended.xml")[first].startswith("ref")


def test_what_is_tried_is_not_cached(folder: Path, tmp_path: Path) -> None:
    choose_kernels(folder / "model.xml", optc.Target(threads=2), OpenVinoOptions(cache=True))
    assert not list(tmp_path.rglob("*.blob"))


def test_slow_kernels_are_not_chosen(folder: Path, target: optc.Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc_openvino.choice._OTHERS", dict.fromkeys(("amx", "avx512", "avx2"), (SLOWEST,)))
    assert choose_kernels(folder / "model.xml", target, OpenVinoBackend.options(target)) == {}


def test_a_model_of_other_layers_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    OpenVinoBackend().lower(optc.capture(model, (torch.randn(2, 8),)), optc.Target(threads=2), tmp_path)
    monkeypatch.setattr("optc_openvino.choice.compile_and_fill", None)
    assert choose_kernels(tmp_path / "model.xml", optc.Target(threads=2), OpenVinoOptions()) == {}


def chosen_anyhow(path: Path, target: optc.Target, given: OpenVinoOptions) -> dict[str, tuple[str, ...]]:
    """A choice that is sure to be another than OpenVINO's, as no measurement could be."""
    model = read(path)
    return {node.get_friendly_name(): SLOWEST for node in model.get_ops() if node.get_type_name() == "Convolution"}


def test_the_choice_goes_with_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # as run.py does, and undone here
    monkeypatch.setattr(backend_module, "choose_kernels", chosen_anyhow)
    target = optc.Target(threads=2, batch=2, options={"openvino": {"kernels": "measured"}})
    made = optc.optimize(convolutions(), X, "fuse", backend="openvino", target=target, measure=False)
    artifact = made.save(tmp_path / "convolutions")
    assert {file.name for file in artifact.iterdir()} == {"kernels.xml", "model.bin", "manifest.json", "run.py"}
    assert '"ref_any"' in (artifact / "manifest.json").read_text()
    script = runpy.run_path(str(artifact / "run.py"))
    compiled = script["load"](batch=2, threads=2)
    assert sum(kernel.primitive.startswith("ref") for kernel in kernels(compiled)) == 2
    runner: Any = optc.load(artifact)
    expected = made.program.run(X)[0].numpy()
    for outputs in (runner(X.numpy()), script["run"](compiled, [X.numpy()])):
        np.testing.assert_allclose(outputs[0], expected, rtol=1e-4, atol=1e-5)


def test_kernels_that_were_measured_are_not_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = optc.Target(threads=2, batch=2)
    first, *_ = primitives(folder, "model.xml")
    write_choice(folder / "model.xml", {first: SLOWEST}, folder / "slow.xml")
    (folder / "slow.bin").write_bytes((folder / "model.bin").read_bytes())
    divided = OpenVinoOptions(streams=2)
    chosen = choose_kernels(folder / "slow.xml", target, divided)
    assert recall_kernels(folder / "slow.xml", target) == chosen != {}
    assert recall_kernels(folder / "slow.xml", optc.Target(threads=1, batch=2)) is None
    assert recall_kernels(folder / "model.xml", target) is None
    (remembered,) = (tmp_path / "cache").rglob("*.json")
    remembered.write_text("[1]")
    assert recall_kernels(folder / "slow.xml", target) is None


def test_asked_for_the_backend_takes_the_kernels_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"a convolution": SLOWEST}
    monkeypatch.setattr(backend_module, "recall_kernels", lambda path, target: measured)
    monkeypatch.setattr(backend_module, "choose_kernels", None)
    target = optc.Target(threads=2, batch=2, options={"openvino": {"kernels": "measured"}})
    lowered = OpenVinoBackend().lower(optc.capture(convolutions(), (X,)), target, tmp_path)
    assert lowered.details["kernels"] == {"a convolution": ["ref_any"]}


def test_what_is_written_is_compared_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(path: Path, chosen: Any, written: Path) -> None:
        written.write_text(path.read_text().replace('type="ReLU"', 'type="Abs"'))

    monkeypatch.setattr(backend_module, "choose_kernels", chosen_anyhow)
    monkeypatch.setattr(backend_module, "write_choice", wrong)
    target = optc.Target(threads=2, batch=2, options={"openvino": {"kernels": "measured"}})
    with pytest.raises(optc.BackendError, match="differently from the optimized graph"):
        OpenVinoBackend().lower(optc.capture(convolutions(), (X,)), target, tmp_path)


@pytest.mark.parametrize(
    ("given", "ways"),
    [
        ({}, [("streams",), ("kernels",), ("streams", "kernels")]),
        ({"kernels": "default"}, [("streams",)]),
        ({"streams": 1}, [("kernels",)]),
        ({"streams": 2, "kernels": "measured"}, []),
    ],
)
def test_what_nobody_asked_for_is_offered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], ways: list[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(backend_module, "choose_kernels", chosen_anyhow)
    target = optc.Target(threads=2, batch=2, options={"openvino": {"partitioner": "default", **given}})
    lowered = optc.Lowered(("model.xml", "model.bin"), {"divisible": True})
    offered = OpenVinoBackend().variants(lowered, target, folder)
    assert [tuple(options) for options, _ in offered] == ways
    assert all(made.files[0] == ("kernels.xml" if "kernels" in options else "model.xml") for options, made in offered)
    assert all(f'MODEL = "{made.files[0]}"' in made.run_script for _, made in offered)


def test_streams_go_with_kernels_that_were_asked_for(folder: Path) -> None:
    target = optc.Target(threads=2, batch=2, options={"openvino": {"kernels": "measured", "partitioner": "auto"}})
    lowered = optc.Lowered(("kernels.xml", "model.bin"), {"divisible": True})
    ((options, divided),) = OpenVinoBackend().variants(lowered, target, folder)
    assert options == {"streams": 2}
    assert divided.files == lowered.files
    assert 'MODEL = "kernels.xml"' in divided.run_script


def test_nothing_is_offered_where_openvino_chose_well(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "choose_kernels", lambda path, target, given: {})
    lowered = optc.Lowered(("model.xml", "model.bin"), {"divisible": True})
    monkeypatch.setattr(backend_module, "faster_partitioner", lambda model, target, given: None)
    assert OpenVinoBackend().variants(lowered, optc.Target(threads=2), folder) == []
