from __future__ import annotations

import json
import logging
import math
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import optc
from optc.bench.measure import measure
from optc.cli.main import run
from optc.lowering.inductor import InductorBackend
from optc.machine import isa
from optc_openvino import backend as backend_module
from optc_openvino.backend import OpenVinoBackend
from optc_openvino.runtime import ROUNDED_TOGETHER, VERSION

TARGET = optc.Target(threads=2)
Sqnr = Callable[[np.ndarray, np.ndarray], float]
WHOLE = pytest.param("whole_vit_int8", 50, marks=pytest.mark.slow)


def run_on(optimized: optc.Optimized, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """What the graph computes of a batch, and what OpenVINO does."""
    images = torch.randn(batch, 3, 224, 224)
    runner = optimized.load()
    (output,) = runner(images.numpy())
    runner.close()
    return optimized.program.run(images)[0].numpy(), output


def test_the_command_lists_it_and_names_the_plugin() -> None:
    command = [sys.executable, "-m", "optc.cli.main", "backends", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (listed,) = [row for row in json.loads(done.stdout) if row["name"] == "openvino"]
    assert listed["plugin"] == "openvino"
    assert listed["ready"], listed["reason"]


@pytest.mark.parametrize("name", ["alexnet", "vit"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_float_model_runs_as_float(name: str, batch: int, request: pytest.FixtureRequest, sqnr_db: Sqnr) -> None:
    optimized: optc.Optimized = request.getfixturevalue(name)
    assert optimized.report.provider in (f"openvino CPU {VERSION}", f"openvino CPU {VERSION}, 1 of 2 threads")
    assert optimized.report.precision == "float32"
    assert float(optimized.details["check"]["sqnr_db"]) > 100
    graph, output = run_on(optimized, batch)
    assert output.dtype == np.float32
    assert sqnr_db(graph, output) > 100


@pytest.mark.parametrize(("name", "layers"), [("alexnet_int8", 8), ("vit_int8", 18), WHOLE])
@pytest.mark.parametrize("batch", [1, 4])
def test_an_int8_model_runs_in_int8(
    name: str, layers: int, batch: int, request: pytest.FixtureRequest, sqnr_db: Sqnr
) -> None:
    optimized: optc.Optimized = request.getfixturevalue(name)
    assert optimized.report.precision == f"int8 ({layers} of {layers} layers)"
    assert optimized.details["not_int8"] == {}
    graph, output = run_on(optimized, batch)
    # A ViT with random weights amplifies each rounding; what OpenVINO computes wrongly leaves it less than 20 dB.
    assert sqnr_db(graph, output) > 25


def test_int8_weights_are_stored_as_int8(alexnet: optc.Optimized, alexnet_int8: optc.Optimized) -> None:
    small, large = (sum(file.stat().st_size for file in made.files) for made in (alexnet_int8, alexnet))
    assert small < 0.27 * large


def test_bfloat16_in_the_graph_is_honoured_and_told(tmp_path: Path) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Conv2d(3, 32, 3).bfloat16()
            self.full = nn.Conv2d(32, 32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.full(self.low(x.bfloat16()).relu().float())

    program = optc.capture(Half(), (torch.randn(1, 3, 32, 32),))
    backend = OpenVinoBackend()
    lowered = backend.lower(program, TARGET, tmp_path)
    runner = backend.load(tmp_path, lowered.files, TARGET)
    emulated_at_least = "avx512f" in (isa() or ())  # by AVX-512 alone, and not listed among its capabilities
    assert runner.precision == ("bfloat16 (1 of 2 layers, 1 float32)" if emulated_at_least else "float32")
    assert lowered.details["check"]["bound_db"] == 30


def test_layers_that_do_not_run_in_int8_are_listed(
    vit_int8: optc.Optimized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With the zero points left in, OpenVINO 2026.4 runs some of the layers in float32.
    monkeypatch.setattr(backend_module, "drop_zero_points", lambda model: 0)
    backend = OpenVinoBackend()
    lowered = backend.lower(vit_int8.program, TARGET, tmp_path)
    not_int8 = lowered.details["not_int8"]
    precision = backend.load(tmp_path, lowered.files, TARGET).precision
    assert not_int8
    assert precision == f"int8 ({18 - len(not_int8)} of 18 layers, {len(not_int8)} float32)"
    assert "blocks.0.attn.proj.weight" in not_int8
    assert "float32 kernel" in not_int8["blocks.0.attn.proj.weight"]


def test_a_model_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = optc.export_onnx

    def damage(program: optc.Program, path: Path) -> object:
        """What a broken exporter would do: one weight differs."""
        result = export(program, path)
        model = onnx.load(path)
        weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
        array = numpy_helper.to_array(weight).copy()
        array.flat[0] += 0.5
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        onnx.save(model, path)
        return result

    monkeypatch.setattr(optc, "export_onnx", damage)
    program = optc.capture(nn.Conv2d(3, 8, 3), (torch.randn(1, 3, 16, 16),))
    with pytest.raises(optc.BackendError, match=r"openvino computes output 'output' differently.*at least 60 dB"):
        OpenVinoBackend().lower(program, TARGET, tmp_path)


def test_only_the_ir_is_left_in_the_folder(two_inputs: Path) -> None:
    assert sorted(file.name for file in two_inputs.iterdir()) == ["model.bin", "model.xml"]
    assert str(two_inputs.parent) not in (two_inputs / "model.xml").read_text()


@pytest.mark.parametrize("name", ["model.xml", "model.bin"])
@pytest.mark.parametrize("what", ["truncated", "missing"])
def test_damaged_files_get_one_line(name: str, what: str, alexnet_int8: optc.Optimized, tmp_path: Path) -> None:
    for file in alexnet_int8.files:
        content = file.read_bytes()
        if file.name != name:
            (tmp_path / file.name).write_bytes(content)
        elif what == "truncated":
            (tmp_path / file.name).write_bytes(content[: len(content) // 2])
    with pytest.raises(optc.BackendError, match=r"openvino (refuses|cannot read) model\.xml: \w") as caught:
        OpenVinoBackend().load(tmp_path, ("model.xml", "model.bin"), TARGET)
    assert "\n" not in str(caught.value)
    assert "Exception from" not in str(caught.value)


def test_only_the_cpu_is_offered(two_inputs: Path) -> None:
    assert OpenVinoBackend.unavailable(TARGET) is None
    reason = OpenVinoBackend.unavailable(optc.Target(device="cuda"))
    assert reason is not None
    assert "not on 'cuda'" in reason
    with pytest.raises(optc.BackendError, match="not on 'cuda'"):
        OpenVinoBackend().load(two_inputs, ("model.xml", "model.bin"), optc.Target(device="cuda"))


def test_an_artifact_runs_in_optc_and_without_it(alexnet_int8: optc.Optimized, tmp_path: Path) -> None:
    folder = alexnet_int8.save(tmp_path / "alexnet")
    images = np.random.default_rng(0).standard_normal((3, 3, 224, 224)).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    (expected,) = optc.load(folder)(images)
    blocked = "import sys; sys.modules.update(dict.fromkeys(('optc', 'torch', 'onnx', 'onnxruntime')))"
    code = (
        f"{blocked}; import runpy; sys.argv[1:] = ['images.npy']; runpy.run_path('alexnet/run.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, *rows = done.stdout.splitlines()
    assert first == "output shape: (3, 1000)"
    assert [int(row.split()[2].rstrip(":")) for row in rows] == expected.argmax(1).tolist()
    assert done.stderr == ""


@pytest.mark.parametrize("module", ["optc_openvino.backend", "run"])
def test_nothing_is_reported_to_anyone(module: str, tmp_path: Path) -> None:
    """``import openvino`` alone would write a client id below the home folder before it sends anything."""
    (tmp_path / "run.py").write_text(backend_module.RUN_SCRIPT.read_text())
    code = f"import sys, {module}; print(sys.modules.get('openvino_telemetry'), 'openvino' in sys.modules)"
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | {"HOME": str(tmp_path / "home")}
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.split() == ["None", "True"], done.stderr
    assert done.stderr == ""
    assert not list((tmp_path / "home").iterdir())


def test_the_hint_goes_with_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # as run.py does, and undone here
    target = optc.Target(threads=2, options={"openvino": {"hint": "throughput"}})
    made = optc.optimize(
        nn.Linear(4, 4), torch.randn(1, 4), "fuse", backend="openvino", target=target, verify=False, measure=False
    )
    folder = made.save(tmp_path / "linear")
    assert optc.load(folder).concurrency > 1
    model = runpy.run_path(str(folder / "run.py"))["load"](threads=2)
    assert model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") == 2
    assert model.get_property("INFERENCE_NUM_THREADS") == 2


def test_streams_go_with_the_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # as run.py does, and undone here
    target = optc.Target(threads=2, batch=4, options={"openvino": {"streams": 2}})
    made = optc.optimize(
        nn.Linear(4, 4), torch.randn(4, 4), "fuse", backend="openvino", target=target, verify=False, measure=False
    )
    folder = made.save(tmp_path / "linear")
    runner = optc.load(folder)
    assert runner.provider.endswith(", 2 streams")
    script = runpy.run_path(str(folder / "run.py"))
    for batch, rows in ((4, 2), (3, 3)):
        x = torch.randn(batch, 4).numpy()
        model = script["load"](batch=batch, threads=2)
        assert model.input(0).shape == [rows, 4]
        for outputs in (runner(x), script["run"](model, [x])):
            np.testing.assert_allclose(outputs[0], made.program.run(torch.from_numpy(x))[0], rtol=1e-5, atol=1e-6)


NOTHING_MEASURED = {"kernels": "default", "partitioner": "default"}


@pytest.mark.parametrize(
    ("batch", "threads", "given", "expected"),
    [
        (16, 2, {}, [2]),
        (6, 4, {}, [2]),
        (16, 64, {"cache": False}, [16]),
        (1, 2, {}, []),
        (4, 1, {}, []),
        (4, 2, {"hint": "throughput"}, []),
        (4, 2, {"streams": 1}, []),
    ],
)
def test_a_stream_for_each_thread_is_offered_for_batches(
    batch: int, threads: int, given: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    target = optc.Target(threads=threads, batch=batch, options={"openvino": {**NOTHING_MEASURED, **given}})
    backend, lowered = OpenVinoBackend(), optc.Lowered(("model.xml", "model.bin"), {"divisible": True})
    offered = backend.variants(lowered, target, tmp_path)
    assert [options["streams"] for options, _ in offered] == expected
    assert all(f"STREAMS = {options['streams']}\n" in made.run_script for options, made in offered)
    assert backend.variants(optc.Lowered(lowered.files, {"divisible": False}), target, tmp_path) == []


class BesideTheMean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)


@pytest.mark.parametrize(("model", "divides"), [(nn.Linear(8, 8), True), (BesideTheMean(), False)])
def test_streams_are_measured_where_samples_do_not_depend_on_one_another(
    model: nn.Module, divides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.contest.WORTH_OTHER_OPTIONS", math.inf)  # such small models are faster elsewhere
    monkeypatch.setattr(InductorBackend, "unavailable", lambda target: "it compiles for seconds")
    monkeypatch.setattr("optc.selection.measure_candidates", partial(measure, blocks=2, block_seconds=0.05))
    monkeypatch.setattr("optc.bench.measure.SETTLING_SECONDS", 0.0)
    target = optc.Target(threads=2, batch=4, options={"openvino": NOTHING_MEASURED})
    made = optc.optimize(model, torch.ones(1, 8), "fuse", target=target, measure=False)
    (divided,) = [each for each in made.report.backends if each.options]
    assert (divided.backend, divided.options) == ("openvino", {"streams": 2})
    if divides:
        assert divided.p50_ms is not None
        return
    assert not divided.chosen
    assert divided.reason.startswith("openvino streams=2 computes output 'output_0' differently")


@pytest.mark.parametrize("streams", [2, 3])
def test_a_batch_of_dependent_samples_is_not_divided_where_that_is_asked_for(streams: int) -> None:
    target = optc.Target(threads=2, batch=4, options={"openvino": {"streams": streams}})
    with pytest.raises(optc.BackendError, match="depends on others of its batch") as caught:
        optc.optimize(BesideTheMean(), torch.ones(1, 8), "fuse", backend="openvino", target=target, measure=False)
    assert "leave out -O openvino.streams" in str(caught.value)


class Summed(nn.Module):
    """One of its outputs is a number for the whole batch."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, x.sum()


class Turned(nn.Module):
    """The batch of its output is not the first dimension."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)


def test_a_batch_that_the_model_fixes_is_divided_only_where_that_is_asked_for_and_then_it_is_an_error(
    tmp_path: Path,
) -> None:
    x = torch.arange(12.0).reshape(2, 6)
    program = optc.capture(Turned(), (x,), dynamic_batch=False)
    backend, target = OpenVinoBackend(), optc.Target(threads=2, batch=2)
    lowered = backend.lower(program, target, tmp_path)
    assert not lowered.details["divisible"]
    assert all("streams" not in options for options, _ in backend.variants(lowered, target, tmp_path))
    divided = target.with_options("openvino", {"streams": 2})
    with pytest.raises(optc.BackendError, match=r"a batch that cannot be divided — leave out -O openvino\.streams"):
        backend.lower(program, divided, tmp_path)
    windows = optc.capture(Turned(), (torch.ones(4, 6),), dynamic_batch=False)  # a layer by itself, of parts of images
    whole = backend.lower(windows, divided, tmp_path)
    assert not whole.details["divisible"]
    assert "STREAMS = 1" in (whole.run_script or "")
    with pytest.raises(optc.BackendError, match="an input or output has a batch that cannot be divided"):
        backend.lower(optc.capture(Summed(), (torch.ones(4, 6),)), divided, tmp_path)


def test_files_beside_model_and_weights_are_not_for_openvino(tmp_path: Path) -> None:
    program = optc.capture(nn.Linear(4, 4), (torch.ones(2, 4),))
    backend, target = OpenVinoBackend(), optc.Target(threads=1)
    files = backend.lower(program, target, tmp_path).files
    with closing(backend.load(tmp_path, (*files, "run.py"), target)) as runner:
        assert runner(np.ones((1, 4), np.float32))[0].shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["streams=0"], "greater than or equal to 1"),
        (["streams=two"], "valid integer"),
        (["hint=throughput", "streams=2"], "queries that share the threads, not parts of one"),
    ],
)
def test_streams_that_cannot_be_are_one_line(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [part for option in options for part in ("-O", f"openvino.{option}")]
    code = run(["optimize", "alexnet", "--weights", "random", *given, "-o", "out"])
    logging.disable(logging.NOTSET)  # which the command has done for all of its process
    assert code == 2
    printed = capsys.readouterr().err
    assert said in printed.splitlines()[-1]
    assert "option openvino.streams=" in printed
    assert not list(tmp_path.iterdir())


def test_run_py_rounds_inputs_as_the_backend_does() -> None:
    assert f'"DYNAMIC_QUANTIZATION_GROUP_SIZE": {ROUNDED_TOGETHER}' in backend_module.RUN_SCRIPT.read_text()


def test_loading_needs_no_torch() -> None:
    code = "import sys, optc_openvino.backend; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_listing_needs_no_openvino() -> None:
    code = "import sys, optc_openvino; sys.exit('openvino' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
