from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from optc import Target
from optc.bench.limits import in_force
from optc.bench.measure import measure
from optc.bench.results import Candidate
from optc.bench.run import run_document
from optc.bench.surroundings import surroundings
from optc.cli import compare
from optc.lowering.artifact import load_artifact

Command = Callable[..., Any]
LINEAR = """
import torch

def linear():
    return torch.nn.Linear(8, 4), (torch.randn(1, 8),)
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "ROUNDS", 2)
    monkeypatch.setattr(compare, "BLOCK_SECONDS", 0.02)


@pytest.fixture(scope="module")
def run_file(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short measurement as ``optc profile`` writes it."""
    artifact, target = load_artifact(artifacts / "plain"), Target()
    candidate = Candidate("plain", "", False, artifact.runner, 0, (artifact.example_query(),))
    measured = measure([candidate], [], target, blocks=2, block_seconds=0.02)
    path = tmp_path_factory.mktemp("runs") / "saved.json"
    path.write_text(json.dumps(run_document(measured, surroundings(target, in_force()))))
    return path


def test_artifacts_are_compared_with_the_first_in_turns(artifacts: Path, command: Command) -> None:
    plain, fused = str(artifacts / "plain"), str(artifacts / "fused")
    done = command("compare", plain, fused, "--json", "-q")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [each["target"] for each in document["targets"]] == [plain, fused]
    assert [len(each["result"]["blocks"]) for each in document["targets"]] == [2, 2]
    (comparison,) = document["comparisons"]
    assert (comparison["base"], comparison["target"], comparison["interleaved"]) == (plain, fused, True)
    ratio = comparison["ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert ratio["confidence"] == 0.99
    assert comparison["outcome"] in comparison["verdict"]


def test_a_folder_of_artifacts_stands_for_each_and_the_verdict_comes_last(artifacts: Path, command: Command) -> None:
    done = command("compare", str(artifacts), "-q")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "times the first" in words
    assert words.endswith(("faster", "slower", "no difference shown"))


def test_saved_runs_compare_without_measuring_and_say_so(run_file: Path, command: Command) -> None:
    done = command("compare", str(run_file), str(run_file), "-q")
    assert done.returncode == 0, done.stderr
    assert "no difference shown" in " ".join(done.stdout.split())
    assert "measured at different times" in " ".join(done.stdout.split())


def test_the_folder_of_a_run_stands_for_it(run_file: Path, command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "monday"
    folder.mkdir()
    (folder / "profile.json").write_bytes(run_file.read_bytes())
    done = command("compare", str(folder), str(run_file), "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert [each["target"] for each in json.loads(done.stdout)["targets"]] == [str(folder), str(run_file)]


def test_a_saved_run_of_other_threads_is_refused_unless_forced(
    run_file: Path, artifacts: Path, command: Command, tmp_path: Path
) -> None:
    document: dict[str, Any] = json.loads(run_file.read_text())
    document["surroundings"]["threads"] = 77
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    refused = command("compare", str(run_file), str(other), "-q")
    assert refused.returncode == 2
    assert "threads" in refused.stderr
    assert "77" in refused.stderr
    assert "--force" in refused.stderr
    alike = command("compare", str(run_file), str(artifacts / "plain"), "-q")
    assert alike.returncode == 0, alike.stderr
    assert "not measured under the same conditions" not in " ".join(alike.stdout.split())
    forced = command("compare", str(other), str(artifacts / "plain"), "--force", "-q")
    assert forced.returncode == 0, forced.stderr
    assert "not measured under the same conditions" in " ".join(forced.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run.json",), "two targets or more"),
        (("run.json", "two.json"), "is no measured run"),
        (("run.json", "nothing.json"), "cannot read 'nothing.json': [Errno 2] No such file or directory"),
        (("no-such-model", "run.json"), "unknown model 'no-such-model'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    run_file: Path,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.json").write_text(run_file.read_text())
    Path("two.json").write_text("{}")
    done = command("compare", *arguments, "-q")
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_queries_of_other_numbers_of_images_are_not_compared(
    artifacts: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(torch.nn.Linear(8, 4), (torch.randn(3, 8),)), "three.pt2")
    options = ("--passes", "fuse", "--backend", "onnxruntime", "--no-measure", "-q", "--batch", "3", "-o", "fixed")
    assert command("optimize", "three.pt2", *options).returncode == 0
    done = command("compare", str(artifacts / "plain"), "fixed", "-q")
    assert done.returncode == 2
    words = "'fixed' takes queries of 3 images only, not queries of 1 image as the others — compare with --batch 3"
    assert done.stderr == f"optc: {words}\n"
    assert command("compare", str(artifacts / "plain"), "fixed", "--batch", "3", "-q").returncode == 0


@pytest.mark.usefixtures("briefly")
def test_a_saved_run_has_the_queries_that_it_was_measured_with(
    artifacts: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(torch.nn.Linear(8, 4), (torch.randn(3, 8),)), "three.pt2")
    options = ("--passes", "fuse", "--backend", "onnxruntime", "--no-measure", "-q", "-o", "fixed")
    assert command("optimize", "three.pt2", *options).returncode == 0
    assert command("profile", "fixed", "-o", "run", "--against", "none", "-q").returncode == 0
    again = command("compare", "run", "fixed", "-q")
    assert again.returncode == 0, again.stderr
    assert "Latency of queries of 3 images" in again.stdout
    other = command("compare", "run", str(artifacts / "plain"), "--batch", "1", "-q")
    assert (other.returncode, "batch" in other.stderr) == (2, True)


@pytest.mark.usefixtures("for_a_gpu")
def test_targets_on_different_devices_are_refused(artifacts: Path, command: Command) -> None:
    done = command("compare", str(artifacts / "plain"), "made", "-q")
    assert done.returncode == 2
    assert "the targets run on different devices" in done.stderr


def test_what_concerns_all_is_told(artifacts: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.bench.measure.busy_warning", lambda: "the machine was busy")
    done = command("compare", str(artifacts / "plain"), str(artifacts / "fused"), "--json", "-q")
    assert any("the machine was busy" in note for note in json.loads(done.stdout)["notes"])


@pytest.mark.usefixtures("briefly", "uncompiled")
def test_artifacts_are_compared_with_the_queries_they_are_optimized_for(
    artifacts: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "linear_model.py").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    options = ("--passes", "fuse", "--backend", "onnxruntime", "--no-measure", "-q", "--batch", "3", "-o", "of-three")
    assert command("optimize", "linear_model:linear", *options).returncode == 0
    plain = str(artifacts / "plain")

    done = command("compare", "of-three", plain, "linear_model:linear", "-q")
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert words.startswith("Latency of queries of 3 images")
    assert f"{plain} is optimized for queries of 1 image, not for queries of 3 images as here" in words

    done = command("compare", "of-three", plain, "--batch", "1", "--json", "-q")
    document = json.loads(done.stdout)
    assert document["surroundings"]["batch"] == 1
    assert "of-three is optimized for queries of 3 images, not for queries of 1 image as here" in document["notes"]

    done = command("profile", "of-three", "--against", "none", "--json", "-q")
    (note,) = json.loads(done.stdout)["notes"]
    assert "not for queries of 1 image as SingleStream's: 'optc compare --batch 3' measures others" in note
