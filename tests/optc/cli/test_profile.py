from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optc.bench.run import read_run
from optc.cli import profiling
from optc.cli.main import run
from optc.data.digits import DigitsDataset, _DigitsSplit
from optc.lowering.onnxruntime import OnnxRuntimeRunner

Command = Callable[..., Any]
ALONE = ("--against", "none")
LABELLED = """
import torch
from torch import nn

def labelled():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 10)), (torch.randn(1, 3, 224, 224),)

"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "SECONDS", 0.3)
    monkeypatch.setattr(profiling, "STEADY_SECONDS", 0.0)
    monkeypatch.setattr(profiling, "BLOCK_SECONDS", 0.02)
    monkeypatch.setattr(profiling, "ARTIFACT_SECONDS", 1.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "labelled_model.py").write_text(LABELLED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_scenario_of_every_artifact_in_a_folder(artifacts: Path, command: Command, folder: Path) -> None:
    done = command("profile", str(artifacts), "--scenario", "all", "-o", "out", "--json", "-q", *ALONE)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    names = [str(artifacts / "fused"), str(artifacts / "plain")]
    assert [result["name"] for result in document["results"]] == names
    assert [target["weights"] for target in document["targets"]] == ["given", "given"]
    assert {(each["name"], each["scenario"]) for each in document["scenarios"]} == {
        (name, scenario) for name in names for scenario in ("MultiStream", "Server", "Offline")
    }
    assert all(each["loadgen"]["scenario"].replace(" ", "") == each["scenario"] for each in document["scenarios"])
    assert document["overhead"]["loadgen_ns"] > 0
    assert document["against"] is None
    run = read_run(folder / "out" / "profile.json")
    assert [result.name for result in run.results] == names
    summaries = list((folder / "out").glob("open/optc/results/*/*/*/performance/run_1/mlperf_log_summary.txt"))
    assert len(summaries) == 8
    blocks = list((folder / "out").glob("open/optc/results/*/*fused/SingleStream/performance/run_*"))
    assert len(blocks) == len(run.results[0].blocks)


def test_the_table_says_what_is_valid_and_what_was_in_force(artifacts: Path, command: Command) -> None:
    cpu = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    limits = ("--cpu-affinity", str(cpu), "--memory-limit", "64GiB", "--threads", "1")
    done = command("profile", str(artifacts / "plain"), "--scenario", "offline", *limits, "-q", *ALONE)
    assert done.returncode == 0, done.stderr
    assert os.sched_getaffinity(0) == before
    words = " ".join(done.stdout.split())
    assert f"1 thread, on CPU {cpu}, at most 68719 MB of memory" in words
    assert "samples/s" in words
    assert "VALID" in words
    assert "of each latency by LoadGen's clock (null backend), which p50, p90 and p99 are without" in words
    assert "SingleStream" not in words


def test_settings_are_for_what_runs_with_them(artifacts: Path, command: Command, folder: Path) -> None:
    (folder / "my.conf").write_text("*.*.min_query_count = 70\n")
    asked = ("--user-conf", "my.conf", "-o", "out", "--json", "-q", *ALONE)
    done = command("profile", str(artifacts / "plain"), "--scenario", "all", *asked)
    assert done.returncode == 0, done.stderr
    (note,) = json.loads(done.stdout)["notes"]
    assert note == "SingleStream is measured in blocks, without --user-conf: --official runs it so"
    written = {path.parent.name: path.read_text() for path in (folder / "out").rglob("user.conf")}
    own = (folder / "my.conf").read_text()
    assert [name for name, text in written.items() if text != own] == ["SingleStream"]
    assert len(written) == 4


def test_accuracy_is_loadgens_and_stands_in_the_table(command: Command, folder: Path) -> None:
    made = command("optimize", "labelled_model:labelled", "--passes", "fuse", "--backend", "onnxruntime",
                   "--no-measure", "-q", "-o", "made")  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = command("profile", "made", "--data", "digits", "-o", "out", "-q", *ALONE)
    assert done.returncode == 0, done.stderr
    document = json.loads((folder / "out" / "profile.json").read_text())
    (accuracy,) = document["accuracies"]
    assert accuracy["total"] == 359
    assert accuracy["top1"] == accuracy["correct"] / 359
    assert f"{accuracy['top1']:.2%}" in done.stdout
    (text,) = (folder / "out").rglob("accuracy/accuracy.txt")
    assert f"good={accuracy['correct']}, total=359" in text.read_text()


@pytest.mark.parametrize("place", ["split", "batches"])
def test_a_dataset_that_fails_costs_the_accuracy_only(
    place: str, artifacts: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("images")

    monkeypatch.setattr(DigitsDataset if place == "split" else _DigitsSplit, place, fail)
    done = command("profile", str(artifacts / "plain"), "--data", "digits", "--json", "-q", *ALONE)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["results"][0]["percentiles"]["count"] > 0
    (note,) = document["notes"]
    assert "dataset 'digits' (from optc.builtin) raised KeyError: 'images'" in note


def test_random_weights_have_no_accuracy(artifacts: Path, command: Command, folder: Path) -> None:
    shutil.copytree(artifacts / "plain", "made")
    manifest = json.loads(Path("made/manifest.json").read_text())
    manifest["model"]["weights"] = "random"
    Path("made/manifest.json").write_text(json.dumps(manifest))
    done = command("profile", "made", "--data", "digits", "--json", "-q", *ALONE)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["accuracies"] == []
    assert document["notes"] == ["made: no accuracy, its weights are random"]
    assert document["targets"][0]["parameters"] == manifest["report"]["model_bytes"] // 4


@pytest.mark.usefixtures("for_a_gpu")
def test_what_runs_on_a_gpu_is_not_compared_with_a_reference_on_the_cpu(command: Command) -> None:
    done = command("profile", "made", "--json", "-q")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["device"] == document["surroundings"]["device"] == "cuda"
    assert document["against"] is None
    assert "no comparison: vit_huge_patch14_224 is measured on the CPU, not on cuda" in document["notes"]


@pytest.mark.usefixtures("for_a_gpu")
def test_targets_on_different_devices_are_refused(artifacts: Path, command: Command) -> None:
    done = command("profile", str(artifacts / "plain"), "made", "-q")
    assert done.returncode == 2
    assert "the targets run on different devices" in done.stderr
    assert "plain on cpu, made on cuda" in done.stderr


def test_a_runner_that_fails_is_invalid_and_nothing_hangs(
    artifacts: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: OnnxRuntimeRunner, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        raise RuntimeError("no more memory")

    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", fail)
    done = command("profile", str(artifacts / "plain"), "--scenario", "all", "--json", "-q", *ALONE)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert "no more memory" in document["results"][0]["error"]
    assert len(document["scenarios"]) == 3
    for each in document["scenarios"]:
        assert not each["valid"]
        assert "no more memory" in each["reasons"][0]


def test_an_interrupted_run_leaves_no_folder(
    artifacts: Path, command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: OnnxRuntimeRunner, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        raise KeyboardInterrupt

    monkeypatch.setattr(OnnxRuntimeRunner, "__call__", interrupted)
    before = sorted(folder.iterdir())
    done = command("profile", str(artifacts / "plain"), "-o", "runs/out", "-q", *ALONE)
    assert (done.returncode, done.stderr.strip()) == (2, "optc: interrupted; nothing was left half-written")
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing", *ALONE), "unknown model 'nothing'"),
        ((".", *ALONE), "is no optc artifact"),
        (("ARTIFACT", "--against", "vit_hug"), "unknown model 'vit_hug'"),
        (("ARTIFACT", "--scenario", "Onstream"), "Onstream"),
        (("ARTIFACT", "--memory-limit", "lots"), "is no size of memory"),
        (("ARTIFACT", "--memory-limit", "1MB"), "optc itself has taken"),
        (("ARTIFACT", "--cpu-affinity", "4096"), "may not use CPU 4096"),
        (("ARTIFACT", "--scenario", "Server", "--user-conf", "bad.conf"), "line 1 is no setting"),
        (("ARTIFACT", "-o", "."), "output folder '.' exists"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, artifacts: Path, command: Command, folder: Path
) -> None:
    (folder / "bad.conf").write_text("target_qps is 3\n")
    words = [str(artifacts / "plain") if word == "ARTIFACT" else word for word in arguments]
    done = command("profile", *words, "-q")
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_without_loadgen_one_line_says_what_to_install(
    artifacts: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    done = command("profile", str(artifacts / "plain"), "-q", *ALONE)
    assert done.returncode == 2
    assert "pip install mlcommons-loadgen" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


MASKED = """
import torch

class Masked(torch.nn.Module):
    def forward(self, x, table):
        return x @ table

def masked():
    return Masked(), (torch.randn(2, 3), torch.randn(3, 3))

def pairs():
    class Pairs(torch.nn.Module):
        def forward(self, x):
            return x.flatten(2) if x.shape[0] == 3 else x[:, :, 0]
    return Pairs(), (torch.randn(3, 3, 8, 8),)

def eights():
    class Eights(torch.nn.Module):
        def forward(self, x):
            return x.flatten(2) if x.shape[0] == 8 else x[:, :, 0]
    return Eights(), (torch.randn(8, 3, 8, 8),)
"""


@pytest.fixture(scope="module")
def made_of_fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fixed")
    (made / "fixed_models.py").write_text(MASKED)
    options = ("--passes", "fuse", "--backend", "onnxruntime", "--no-measure", "-q")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        for name, count in (("masked", 1), ("pairs", 3), ("eights", 8)):
            assert run(["optimize", f"fixed_models:{name}", *options, "--batch", str(count), "-o", name]) == 0
    logging.disable(logging.NOTSET)
    return made


@pytest.fixture
def fixed(made_of_fixed: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Artifacts of models with fixed batches: ``masked``, one of whose inputs is no batch, ``pairs``, of three samples,
    and ``eights``.
    """
    monkeypatch.chdir(made_of_fixed)
    return made_of_fixed


@pytest.mark.usefixtures("fixed", "uncompiled")
def test_queries_of_different_sizes_are_not_set_side_by_side(artifacts: Path, command: Command) -> None:
    done = command("profile", "pairs", str(artifacts / "plain"), *ALONE, "-q")
    assert done.returncode == 2
    assert "they take queries of different numbers of images: pairs of 3" in done.stderr
    done = command("profile", "pairs", "--json", "-q")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["batch"] == document["surroundings"]["batch"] == 3
    assert document["against"] is None
    assert any("is measured with queries of one image, not of 3" in note for note in document["notes"])
    done = command("profile", "pairs", "eights", "--scenario", "Offline", *ALONE, "--json", "-q")
    batches = {each["name"]: each["batch"] for each in json.loads(done.stdout)["scenarios"] if each["value"]}
    assert batches == {"pairs": 3, "eights": 8}


@pytest.mark.usefixtures("fixed")
def test_an_input_that_is_no_batch_is_measured_as_it_is(command: Command) -> None:
    done = command("profile", "masked", "fixed_models:masked", *ALONE, "--json", "-q")
    assert done.returncode == 0, done.stderr
    errors = {each["name"]: each["error"] for each in json.loads(done.stdout)["results"]}
    assert errors["masked"] is errors["fixed_models:masked eager-fp32"] is None
    done = command("profile", "masked", "--scenario", "Offline", *ALONE, "--json", "-q")
    (offline,) = json.loads(done.stdout)["scenarios"]
    assert offline["reasons"] == ["one of its inputs is no batch, so that it has no single samples to answer for"]


def test_a_target_is_named_once(artifacts: Path, command: Command) -> None:
    done = command("profile", str(artifacts / "plain"), str(artifacts / "plain"), *ALONE, "-q")
    assert (done.returncode, "a target is named twice" in done.stderr) == (2, True)
