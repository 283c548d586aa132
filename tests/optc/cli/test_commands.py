"""The command line as users run it: what it prints and what it leaves behind.

Commands run in this process, which has imported torch already; one test starts a real one.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from optc.bench.inside import Inside
from optc.cli.backends import status
from optc.cli.main import run
from optc.lowering.artifact import load_artifact
from optc.lowering.onnxruntime import OnnxRuntimeBackend
from optc.plugins.registry import registry
from optc.target import Target

FACTORY = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    net = nn.Sequential(*body, nn.Linear(8, 10))
    return net, (torch.randn(1, 3, 16, 16),)

class Branches(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x

def branches():
    return Branches(), (torch.randn(1, 3),)

class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("three\\nlines\\nlong")

def broken():
    return Broken(), (torch.randn(1, 3, 16, 16),)
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


ORT = ("--backend", "onnxruntime")
Run = Callable[..., Done]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture
def optc(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    def optc(*arguments: str) -> Done:
        code = run(list(arguments))
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    yield optc
    logging.disable(logging.NOTSET)


def test_optimize_writes_an_artifact_that_runs_without_optc(folder: Path, optc: Run) -> None:
    done = optc("optimize", "mine:small", "--passes", "fuse", *ORT, "--no-measure", "--json", "-o", "out")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["artifact"] == "out"
    assert {p["name"] for p in report["passes"] if p["modified"]} >= {"fold-batch-norm", "fuse-activation"}
    assert all(p["notes"]["verify"]["from_captured"]["max_rel"] < 1e-4 for p in report["passes"] if p["modified"])
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["manifest.json", "model.onnx", "run.py"]
    ran = subprocess.run([sys.executable, "out/run.py"], capture_output=True, text=True, cwd=folder, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "(1, 10)" in ran.stdout


def test_a_real_process_fails_with_one_line_and_code_2(folder: Path) -> None:
    command = [sys.executable, "-m", "optc.cli.main", "optimize", "alexnte"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("optc: unknown model 'alexnte'")


@pytest.mark.usefixtures("uncompiled", "briefly")
def test_optimize_measures_and_ends_with_a_verdict(folder: Path, optc: Run) -> None:
    done = optc("optimize", "mine:small", "--passes", "fuse", *ORT, "-q")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("Passes", "Before and after", "eager-fp32", "eager-bf16", "compile-bf16", "p50 ms", "p99 ms"):
        assert word in done.stdout
    end = " ".join(done.stdout.split()[-40:])  # the terminal wraps it
    assert re.search(r"(Faster|NOT faster|NOT shown to be faster): \d+\.\d\dx \[", end)
    assert (folder / "mine-small-optimized").is_dir()


def test_random_weights_are_unmissable_and_have_no_accuracy(folder: Path, optc: Run) -> None:
    arguments = ("optimize", "test_resnet", "--passes", "remove-identity", *ORT, "--no-measure")
    done = optc(*arguments, "--data", "digits", "--weights", "random", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert "not measurable: random weights" in done.stdout
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert manifest["model"]["weights"] == "random"
    assert manifest["report"]["accuracy"]["after"] is None


def test_print_after_and_bisect(folder: Path, optc: Run) -> None:
    arguments = ("optimize", "mine:small", "--passes", "fold-batch-norm,fuse-activation", *ORT, "--no-measure")
    done = optc(*arguments, "--print-after", "fold-batch-norm", "--bisect-limit", "1")
    assert done.returncode == 0, done.stderr
    assert "# graph after fold-batch-norm" in done.stderr
    assert "BISECT: running pass (1) fold-batch-norm" in done.stderr
    assert "BISECT: NOT running pass (2) fuse-activation" in done.stderr


def test_print_after_a_group_prints_after_its_last_pass_and_an_unknown_one_is_refused(folder: Path, optc: Run) -> None:
    arguments = ("optimize", "mine:small", "--passes", "fuse", *ORT, "--no-measure", "-q", "-o", "out")
    done = optc(*arguments, "--print-after", "fold-batchnorm")
    assert "unknown pass in --print-after 'fold-batchnorm' — did you mean fold-batch-norm" in done.stderr
    done = optc(*arguments, "--print-after", "fuse")
    assert done.returncode == 0, done.stderr
    last = json.loads((folder / "out" / "manifest.json").read_text())["report"]["passes"][-1]["name"]
    assert f"# graph after {last} (" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optimize", "alexnte"], "unknown model 'alexnte' — did you mean alexnet"),
        (["optimize", "mine:small", "--passes", "fuze"], "unknown pass 'fuze' — did you mean fuse"),
        (
            ["optimize", "mine:small", "--backend", "onnxruntme"],
            "unknown backend 'onnxruntme' — did you mean onnxruntime",
        ),
        (["optimize", "mine:small", "-O", "fuse.x=1"], "unknown pass in the options 'fuse'"),
        (["optimize", "mine:small", "--pases", "fuse"], "unknown option '--pases' — did you mean --passes"),
        (["optimize", "mine:small", "--data", "empty"], "has no images"),
        (["optimize", "mine:small", "--max-drop", "-1"], "'--max-drop'"),
        (["optimize", "mine:small", "-o", "empty"], "output folder 'empty' exists"),
        (["optimize", "mine:branches"], "mine.py:13"),
        (["optimize", "alexnet", "--weights", "wrong.safetensors"], "classifier.6.weight"),
        pytest.param(
            ["optimize", "mine:small", "--device", "cuda"],
            "sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["optimize", "mine:broken", "--data", "digits"], "mine.py:20: raise ValueError"),
        (["profile", "empty"], "is no optc artifact"),
        (["optimise"], "unknown command 'optimise' — did you mean optimize"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder: Path, optc: Run, arguments: list[str], message: str) -> None:
    (folder / "empty").mkdir()
    if "wrong.safetensors" in arguments:
        from safetensors.torch import save_file

        save_file({"classifier.6.weight": torch.zeros(3, 7)}, folder / "wrong.safetensors")
    if "-O" in arguments:
        arguments = [*arguments, "--passes", "quant"]
    before = sorted(path.name for path in folder.iterdir())
    done = optc(*arguments, *(["-q"] if arguments[0] != "optimise" else []))
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before


def test_a_dataset_whose_classes_are_not_the_models_is_refused(folder: Path, optc: Run) -> None:
    done = optc("optimize", "test_resnet", "--data", "digits", "-o", "out")
    assert done.returncode == 2
    assert "dataset 'digits' has 10 classes but the model has 1000 outputs" in done.stderr.splitlines()[-1]
    assert not (folder / "out").exists()


def _pictures(folder: Path, count: int) -> Path:
    """A folder of pictures without labels."""
    from PIL import Image

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        pixels = torch.randint(0, 256, (48, 48, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:02}.png")
    return folder


SMALL = ("optimize", "test_resnet", "--weights", "random", *ORT, "--no-measure", "-o", "out")


def test_a_budget_without_labels_is_held_as_agreement_and_says_so(folder: Path, optc: Run) -> None:
    pictures = _pictures(folder / "pictures", 24)
    done = optc(*SMALL, "--data", str(pictures), "--max-drop", "40", "--json")
    assert done.returncode == 0, done.stderr
    assert "--max-drop 40 is held as top-1 agreement with the unquantized model" in done.stderr
    report = json.loads(done.stdout)
    assert report["accuracy"]["metric"] == "top-1 agreement"
    assert report["accuracy"]["before"] == 1.0
    assert report["accuracy"]["after"] >= 0.6
    assert "40 allowed" in report["verdict"]


def test_a_file_for_one_batch_size_has_a_budget_too(folder: Path, optc: Run) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
    torch.export.save(torch.export.export(model, (torch.randn(1, 3, 8, 8),)), folder / "mine.pt2")
    done = optc("optimize", "mine.pt2", *ORT, "--no-measure", "--max-drop", "50", "--json", "-o", "out", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy"]["before"] == 1.0


def test_too_few_calibration_images_are_refused_where_ranges_are_needed(folder: Path, optc: Run) -> None:
    pictures = _pictures(folder / "pictures", 6)
    done = optc(*SMALL, "--data", str(pictures), "-q")
    assert done.returncode == 2
    assert "images to calibrate on, fewer than 8" in done.stderr
    *notes, last = done.stderr.strip().splitlines()
    assert last.startswith("optc: ")
    assert not notes or "Note" in notes[0]  # that int8 may be slow on this CPU
    assert not (folder / "out").exists()
    assert optc(*SMALL, "--data", str(pictures), "--passes", "fold-batch-norm", "-q").returncode == 0


@pytest.mark.usefixtures("uncompiled", "briefly")
def test_a_batch_is_optimized_for_and_measured(folder: Path, optc: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.bench.inside.look_inside", lambda *_: Inside(None, None, (), ()))
    done = optc("optimize", "mine:small", "--passes", "fuse", *ORT, "--batch", "3", "--report", "r.md", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert "Before and after, batch 3" in done.stdout
    assert "answers a query of 3 in" in (folder / "r.md").read_text()
    artifact = load_artifact(folder / "out")
    assert artifact.target().batch == 3
    assert [output.shape for output in artifact.runner()(*artifact.example_query(3))] == [(3, 10)]


def test_a_batch_that_the_model_does_not_take_is_one_line(folder: Path, optc: Run) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(4, 4), (torch.randn(2, 4),)), folder / "two.pt2")
    done = optc("optimize", "two.pt2", "--passes", "fuse", *ORT, "--batch", "3", "-o", "out", "-q")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("optc: the model takes a batch of 2 only, not of 3 — export it")
    assert not (folder / "out").exists()


@pytest.mark.usefixtures("uncompiled", "briefly")
def test_an_exported_file_is_measured_against_its_baselines(folder: Path, optc: Run) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5)).eval()
    torch.export.save(torch.export.export(model, (torch.randn(1, 3, 8, 8),)), folder / "mine.pt2")
    done = optc("optimize", "mine.pt2", "--passes", "fuse", *ORT, "--json", "-o", "out")
    assert done.returncode == 0, done.stderr
    errors = {r["name"]: r["error"] for r in json.loads(done.stdout)["measurement"]["results"]}
    assert errors["eager-fp32"] is None
    assert errors["optc"] is None


@pytest.mark.usefixtures("uncompiled", "briefly")
def test_profile_measures_an_artifact_beside_its_model(folder: Path, optc: Run) -> None:
    optc("optimize", "mine:small", "--passes", "fuse", *ORT, "--no-measure", "-o", "out")
    done = optc("profile", "out", "mine:small", "--against", "none", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [r["name"] for r in results][:2] == ["out", "mine:small eager-fp32"]
    assert all(r["percentiles"]["count"] > 0 for r in results if r["error"] is None)


@pytest.mark.usefixtures("briefly", "known_peaks")
def test_a_backends_option_is_kept_in_the_artifact(folder: Path, optc: Run) -> None:
    done = optc(
        *("optimize", "mine:small", "--passes", "fuse", *ORT, "--no-measure", "-o", "out"),
        *("-O", "onnxruntime.spin_us=0", "-O", "onnxruntime.io_binding=yes"),
    )
    assert done.returncode == 0, done.stderr
    target = load_artifact(Path("out")).target(Target(threads=1))
    assert OnnxRuntimeBackend.options(target).model_dump() == {"optimization": "all", "spin_us": 0, "io_binding": True}
    assert 'OPTIMIZATION, SPIN_US = "ORT_ENABLE_ALL", 0' in Path("out", "run.py").read_text()
    ran = subprocess.run([sys.executable, "out/run.py"], capture_output=True, text=True, check=True)
    assert (ran.stdout.strip(), ran.stderr) == ("output shape: (1, 10)", "")
    done = optc("profile", "out", "--against", "none", "--layers")
    assert done.returncode == 0, done.stderr
    listed = optc("backends", "onnxruntime").stdout
    assert "onnxruntime.spin_us" in listed
    assert "1000" in listed


@pytest.mark.parametrize(
    ("option", "backend", "says"),
    [
        ("onnxruntime.spin=0", "onnxruntime", "unknown option of backend onnxruntime 'spin' — did you mean spin_us?"),
        ("onnxruntime.spin_us=-1", "auto", "option onnxruntime.spin_us='-1': Input should be greater than or equal"),
        ("onnxruntime.spin_us=0", "eager", "the backend is 'eager', and there are options for 'onnxruntime'"),
        ("null.speed=11", "null", "it takes no options"),
    ],
)
def test_a_wrong_option_of_a_backend_is_one_line(option: str, backend: str, says: str, folder: Path, optc: Run) -> None:
    done = optc("optimize", "mine:small", "--backend", backend, "-O", option, "-o", "out")
    assert done.returncode == 2
    assert says in done.stderr
    assert not Path("out").exists()


def test_a_backend_of_the_gpu_alone_is_ready_where_it_runs_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not status(registry(), "onnxruntime-tensorrt")["ready"] or torch.cuda.is_available()
    kind = type(registry().load("backend", "onnxruntime-tensorrt")())
    missing = classmethod(lambda cls, target: None if target.device == "cuda" else "it runs on cuda")
    monkeypatch.setattr(kind, "unavailable", missing)
    found = status(registry(), "onnxruntime-tensorrt")
    assert found["ready"]
    assert found["reason"] is None


def test_the_listings_have_json(folder: Path, optc: Run) -> None:
    passes = json.loads(optc("passes", "--json").stdout)
    assert {"fuse", "quant"} <= {p["name"] for p in passes}
    described = json.loads(optc("passes", "quant", "--json").stdout)
    assert "observer" in described["options"]
    backends = json.loads(optc("backends", "--json").stdout)
    assert {"name": "onnxruntime", "ready": True}.items() <= next(
        b for b in backends if b["name"] == "onnxruntime"
    ).items()
    doctor = json.loads(optc("doctor", "--json").stdout)
    assert any(p["name"] == "onnxruntime" and p["ready"] for p in doctor["packages"])


NOISY = """
import torch
from torch import nn

print("imported")

class Loud(nn.Sequential):
    def forward(self, x):
        print("running")
        return super().forward(x)

def four():
    print("called")
    return Loud(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1568, 3)), (torch.randn(1, 4, 16, 16),)
"""


def test_a_model_of_four_channels_that_prints_leaves_stdout_alone(folder: Path, optc: Run) -> None:
    (folder / "noisy.py").write_text(NOISY)
    done = optc("optimize", "noisy:four", "--passes", "fuse", *ORT, "--no-measure", "--json", "-q", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["backend"] == "onnxruntime"
    assert all(word in done.stderr for word in ("imported", "called", "running"))
    refused = optc("optimize", "noisy:four", "--data", "digits", *ORT, "-q", "-o", "other")
    assert "takes 4 channels, and images have one or three" in refused.stderr


@pytest.mark.parametrize("command", ["backends", "doctor"])
def test_a_pip_line_is_printed_whole(command: str, optc: Run) -> None:
    done = optc(command)
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout


def test_sigterm_cleans_up_as_ctrl_c_does(folder: Path) -> None:
    waits = """
        import tempfile, time

        def model():
            with tempfile.TemporaryDirectory(prefix="scratch", dir="."):
                print("ready", flush=True)
                time.sleep(100)
    """
    (folder / "waits.py").write_text(textwrap.dedent(waits))
    command = [sys.executable, "-m", "optc.cli.main", "optimize", "waits:model"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=folder)
    assert process.stderr is not None
    said = list(itertools.takewhile(lambda line: line != "ready\n", process.stderr))
    assert list(folder.glob("scratch*")), said
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert stderr.splitlines()[-1] == "optc: interrupted; nothing was left half-written"
    assert not list(folder.glob("scratch*"))
