"""Lowering to one backend by name, or to every one that takes the program."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import optc
from optc import Backend, BackendError, Lowered, Program, Runner, Target
from optc.errors import OptcError
from optc.lowering import inductor
from optc.lowering.eager import EagerBackend
from optc.lowering.lowering import AUTO, Passing, backends, lower_all, reason_of
from optc.plugins.registry import registry


class Refuses(Backend):
    """Takes no program."""

    name = "refuses"
    summary = "Takes no program."

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        raise BackendError("operator aten.relu.default has no form here")

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        raise AssertionError("nothing was lowered")


@pytest.fixture(scope="module")
def program() -> Program:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    return optc.capture(model, (torch.randn(1, 3, 8, 8),))


def test_auto_means_every_backend_that_runs_here_but_null() -> None:
    found, refused = backends(AUTO, Target())
    names = {backend.name for backend in found}
    assert {"eager", "onnxruntime"} <= names
    assert "null" not in names | refused.keys()


def test_auto_says_why_a_backend_was_left_out() -> None:
    if torch.cuda.is_available():
        pytest.skip("every backend may run on this machine's GPU")
    with pytest.raises(OptcError, match=r"no backend can run here: eager: "):
        backends(AUTO, Target(device="cuda"))


def test_auto_says_that_a_plugins_backend_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTC_DISABLE_PLUGINS", "openvino")
    registry.cache_clear()
    try:
        _, refused = backends(AUTO, Target())
    finally:
        registry.cache_clear()
    assert refused["openvino"] == "backend 'openvino' is left out — take 'openvino' out of OPTC_DISABLE_PLUGINS"


def test_a_named_backend_that_cannot_run_is_an_error() -> None:
    with pytest.raises(OptcError, match="backend 'onnxruntime' cannot run here"):
        backends("onnxruntime", Target(device="tpu"))


def test_each_backend_gets_a_folder_and_refusals_are_kept(program: Program, tmp_path: Path) -> None:
    said: list[str] = []
    done, refused = lower_all([EagerBackend(), Refuses()], program, Target(threads=1), tmp_path, said.append)
    assert [made.backend.name for made in done] == ["eager"]
    assert all(file.parent == tmp_path / "eager" and file.stat().st_size for file in done[0].files)
    assert refused == {"refuses": "operator aten.relu.default has no form here"}
    assert said == ["lowering to eager", "lowering to refuses"]
    runner = done[0].load()
    (output,) = runner(program.example_inputs[0].numpy())
    torch.testing.assert_close(torch.from_numpy(output), program.run(*program.example_inputs)[0])


class Breaks(Refuses):
    """Has a bug."""

    name = "breaks"
    origin = "a-plugin"

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        raise KeyError("weights")


def test_a_bug_in_one_backend_is_its_reason_and_names_its_plugin(program: Program, tmp_path: Path) -> None:
    done, refused = lower_all([EagerBackend(), Breaks()], program, Target(threads=1), tmp_path, lambda text: None)
    assert [made.backend.name for made in done] == ["eager"]
    assert refused == {"breaks": "backend 'breaks' (from a-plugin) raised KeyError: 'weights'"}
    alone = tmp_path / "alone"
    alone.mkdir()
    with pytest.raises(
        BackendError, match=r"^backend 'breaks' \(from a-plugin\) raised KeyError: 'weights' — run with"
    ):
        lower_all([Breaks()], program, Target(threads=1), alone, lambda text: None)


class Forgets(Breaks):
    """Names a file that it did not write."""

    name = "forgets"

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        return Lowered(("model.bin",))


def test_a_backend_that_writes_nothing_leaves_the_others(program: Program, tmp_path: Path) -> None:
    chosen = [EagerBackend(), Forgets()]
    done, refused = lower_all(chosen, program, Target(threads=1), tmp_path, lambda text: None)
    assert [made.backend.name for made in done] == ["eager"]
    assert refused == {"forgets": "backend 'forgets' (from a-plugin) wrote no model.bin"}


class Measures(Refuses):
    """Says whether other processes are at work while it measures."""

    name = "measures"
    beside: ClassVar[list[bool]] = []

    @classmethod
    def measures_to_lower(cls, target: Target) -> bool:
        return True

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        self.beside.append(Compiles.running)
        raise BackendError("seen enough")


class Compiles(Refuses):
    """Is at work from when it was started until its end."""

    name = "compiles"
    running = False

    @contextmanager
    def started(self, program: Program, target: Target, folder: Path) -> Iterator[Callable[[], Lowered]]:
        Compiles.running = True
        try:
            yield lambda: EagerBackend().lower(program, target, folder)
        finally:
            Compiles.running = False


def test_nothing_compiles_beside_a_backend_that_measures(program: Program, tmp_path: Path) -> None:
    Measures.beside.clear()
    chosen = [Compiles(), Measures()]
    done, refused = lower_all(chosen, program, Target(threads=1), tmp_path, lambda text: None)
    assert [made.backend.name for made in done] == ["compiles"]
    assert refused == {"measures": "seen enough"}
    assert Measures.beside == [False]


class Killed(Refuses):
    """Its compiling process ends, by a signal or not."""

    name = "killed"

    def __init__(self, how: str) -> None:
        self.how = how

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        (folder / "log").touch()
        inductor._result(subprocess.Popen(["sh", "-c", self.how]), folder)
        raise AssertionError("it has no result")


@pytest.mark.parametrize(("how", "passing"), [("kill -9 $$", True), ("exit 1", False)])
def test_a_process_that_was_killed_may_do_better_another_time(
    how: str, passing: bool, program: Program, tmp_path: Path
) -> None:
    _, refused = lower_all([EagerBackend(), Killed(how)], program, Target(threads=1), tmp_path, lambda text: None)
    assert isinstance(refused["killed"], Passing) == passing
    (tmp_path / "none").mkdir()
    with pytest.raises(BackendError, match="no backend takes this model") as caught:
        lower_all([Killed(how), Refuses()], program, Target(threads=1), tmp_path / "none", lambda text: None)
    assert caught.value.passing == passing


def test_the_only_backend_raises_its_own_reason(program: Program, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"aten\.relu\.default has no form here"):
        lower_all([Refuses()], program, Target(threads=1), tmp_path, lambda text: None)


def test_no_backend_at_all_names_every_reason(program: Program, tmp_path: Path) -> None:
    class AlsoRefuses(Refuses):
        name = "also-refuses"

    with pytest.raises(BackendError, match=r"refuses: .*; also-refuses: "):
        lower_all([Refuses(), AlsoRefuses()], program, Target(threads=1), tmp_path, lambda text: None)


def test_none_need_take_a_program(program: Program, tmp_path: Path) -> None:
    done, refused = lower_all([Refuses()], program, Target(threads=1), tmp_path, lambda text: None, needed=False)
    assert done == []
    assert list(refused) == ["refuses"]
    assert "aten.relu.default has no form here" in refused["refuses"]


class Wrong(EagerBackend):
    """Computes something else and does not compare it with the graph."""

    name = "wrong"
    shift = 1.0

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        lowered = super().lower(program, target, folder)
        return Lowered(lowered.files, {"no_run_script": lowered.details["no_run_script"]})

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        runner, shift = super().load(folder, files, target), self.shift

        class Shifted(Runner):
            provider, precision = runner.provider, runner.precision

            def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
                return tuple(output + np.float32(shift) for output in runner(*inputs))

        return Shifted()


class Unchecked(Wrong):
    """Computes the same, and does not compare it either."""

    name = "unchecked"
    shift = 0.0


def test_what_a_backend_does_not_compare_with_the_graph_is_compared(program: Program, tmp_path: Path) -> None:
    chosen: list[Backend] = [Wrong(), Unchecked()]
    (made,), refused = lower_all(chosen, program, Target(threads=1), tmp_path, lambda text: None)
    assert made.backend.name == "unchecked"
    assert made.lowered.details["check"]["against"] == "the optimized graph on the example inputs"
    assert refused["wrong"].startswith("wrong computes output 'output' differently from the optimized graph: SQNR ")


class Gives(Refuses):
    """Writes something, then finds that it cannot."""

    name = "gives"

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        (folder / "weights.bin").write_bytes(bytes(1000))
        return super().lower(program, target, folder)


class Counts(EagerBackend):
    """Counts how often its files are opened."""

    name = "counts"
    opened = 0

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        self.opened += 1
        return super().load(folder, files, target)


def test_what_was_written_is_opened_once_and_goes_where_it_came_to_nothing(program: Program, tmp_path: Path) -> None:
    counts = Counts()
    (made,), refused = lower_all([counts, Gives()], program, Target(threads=1), tmp_path, lambda text: None)
    assert counts.opened == 1
    assert (made.provider, made.precision) == (made.load().provider, made.load().precision)
    assert list(refused) == ["gives"]
    assert [path.name for path in tmp_path.iterdir()] == ["counts"]


def _without_devices(target: Target) -> str | None:
    raise ZeroDivisionError("no devices")


@pytest.mark.parametrize(
    ("method", "instead", "error"),
    [
        ("unavailable", _without_devices, "ZeroDivisionError: no devices"),
        ("simulates_quantization", True, "TypeError: 'bool' object is not callable"),  # as it once was
    ],
)
def test_a_bug_while_asking_whether_a_backend_runs_here_names_its_plugin(
    method: str, instead: object, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EagerBackend, method, instead)
    said = f"backend 'eager' (from optc.builtin) raised {error}"
    found, refused = backends(AUTO, Target())
    assert "eager" not in {backend.name for backend in found}
    assert refused["eager"] == said
    with pytest.raises(BackendError, match=re.escape(said)):
        backends("eager", Target())


@pytest.mark.parametrize(
    ("message", "passing"),
    [
        ("onnxruntime cannot load model.onnx: std::bad_alloc", True),
        ("onnxruntime cannot load model.onnx: Failed to allocate memory for requested buffer of size 4294967296", True),
        ("inductor cannot compile the model: [enforce fail] DefaultCPUAllocator: can't allocate memory", True),
        ("inductor cannot compile the model: CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("the C++ compiler g++ failed: g++: fatal error: Killed signal terminated program cc1plus", True),
        ("the C++ compiler g++ failed: fatal error: error writing to /tmp/x.s: No space left on device", True),
        ("operator aten.relu.default has no form here", False),
        ("the model's memory format is not taken", False),
    ],
)
def test_what_ran_out_may_go_well_another_time(message: str, passing: bool) -> None:
    assert isinstance(reason_of(BackendError(message)), Passing) == passing
    assert reason_of(BackendError(message)) == message
