"""The model that ``optc profile`` compares with: measured once, remembered, and never mistaken for another."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optc import Runner, Target
from optc.bench.cache import cache_folder
from optc.bench.measure import measure
from optc.bench.results import Candidate
from optc.bench.run import run_document
from optc.bench.surroundings import surroundings
from optc.cli import profiling

Command = Callable[..., Any]
MODELS = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10)), (torch.randn(1, 3, 8, 8),)
"""

BRIEFLY = """
from optc.cli import profiling
profiling.STEADY_SECONDS, profiling.BLOCK_SECONDS = 0.0, 0.02
from optc.cli.main import main
main()
"""


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "STEADY_SECONDS", 0.0)
    monkeypatch.setattr(profiling, "BLOCK_SECONDS", 0.02)
    monkeypatch.setattr(profiling, "ARTIFACT_SECONDS", 1.0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_reference_is_measured_once_and_remembered(
    artifacts: Path, command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # of the process that measures the reference: saves its compiler
    start = subprocess.run

    def briefly(command: list[str], **options: Any) -> Any:
        where = command.index("-m")
        assert command[where : where + 2] == ["-m", "optc.cli.main"]
        return start([*command[:where], "-c", BRIEFLY, *command[where + 2 :]], **options)

    monkeypatch.setattr(subprocess, "run", briefly)
    export_small(folder / "small.pt2", channels=8)
    arguments = ("profile", str(artifacts / "plain"), "--against", "small.pt2", "--threads", "1", "-q")
    first = command(*arguments, "--json")
    assert first.returncode == 0, first.stderr
    against = json.loads(first.stdout)["against"]
    assert against["name"] == "small.pt2"
    assert against["parameters"] == sum(n for n in (8 * 27 + 8, 8 * 36 * 10 + 10))
    assert {result["name"] for result in against["results"]} >= {"small.pt2 eager-fp32"}
    assert all(result["blocks"][0]["latencies_ns"] for result in against["results"] if result["error"] is None)
    (name,) = against["ratios"]
    ratio = against["ratios"][name]
    fastest = next(result for result in against["results"] if result["name"] == against["fastest"])
    assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert ratio["value"] == pytest.approx(
        json.loads(first.stdout)["results"][0]["percentiles"]["p50_ns"] / fastest["percentiles"]["p50_ns"]
    )
    assert Path(against["file"]).parent == cache_folder("references")

    def no_more(*arguments: object, **options: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(subprocess, "run", no_more)
    second = command(*arguments)
    assert second.returncode == 0, second.stderr
    words = " ".join(second.stdout.split())
    assert "top-1 ratio" in words
    assert "small.pt2 was measured on" in words
    saved = json.loads(Path(against["file"]).read_text())
    Path(against["file"]).write_text(json.dumps({**saved, "warnings": ["it was a full moon"]}))
    assert "the reference, small.pt2: it was a full moon" in " ".join(command(*arguments).stdout.split())
    Path(against["file"]).write_text("{}")
    with pytest.raises(AssertionError, match="measured again"):  # a file that is no run
        command(*arguments)
    Path(against["file"]).write_text(json.dumps(saved))
    export_small(folder / "small.pt2", channels=4)
    with pytest.raises(AssertionError, match="measured again"):  # another model of the same name
        command(*arguments)


def export_small(path: Path, channels: int) -> None:
    net = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Flatten(), nn.Linear(channels * 36, 10))
    torch.export.save(torch.export.export(net, (torch.randn(1, 3, 8, 8),)), path)


def test_the_default_reference_may_fail_and_it_is_said(
    artifacts: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optc.machine.available_memory", lambda: 10**9)
    done = command("profile", str(artifacts / "plain"), "--json", "-q")
    assert done.returncode == 0, done.stderr
    (note,) = json.loads(done.stdout)["notes"]
    assert note.startswith("no comparison: measuring vit_huge_patch14_224 takes 8 GB of memory")
    assert "--against" in note


@pytest.mark.usefixtures("folder", "uncompiled")
def test_a_factorys_model_is_measured_each_time(
    artifacts: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name does not say what its code does by now."""
    name, asked = "small_models:small", []
    text = command("profile", name, "--against", "none", "--threads", "1", "--json", "-q").stdout
    monkeypatch.setattr("optc.bench.reference._measure", lambda *arguments: asked.append(1) or text)
    for count in (1, 2):
        done = command("profile", str(artifacts / "plain"), "--against", name, "--threads", "1", "--json", "-q")
        assert json.loads(done.stdout)["against"]["file"] is None
        assert len(asked) == count


def test_a_reference_of_which_nothing_was_measured_is_not_remembered(
    artifacts: Path, command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Runner:
        raise RuntimeError("no such kernel")

    export_small(folder / "small.pt2", channels=5)
    target, query = Target(threads=1), ((np.ones((1, 3), np.float32),),)
    nothing = measure([Candidate("small.pt2 eager-fp32", "", False, refuse, 0, query)], [], target)
    text = json.dumps(run_document(nothing, surroundings(target)))
    monkeypatch.setattr("optc.bench.reference._measure", lambda *arguments: text)
    before = set(cache_folder("references").glob("*"))
    arguments = ("profile", str(artifacts / "plain"), "--against", "small.pt2", "--threads", "1", "-q")
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert any(note.startswith("no comparison: ") for note in json.loads(done.stdout)["notes"])
    assert set(cache_folder("references").glob("*")) == before


def test_a_file_that_is_none_is_refused_before_anything_is_measured(
    artifacts: Path, command: Command, folder: Path
) -> None:
    (folder / "small.pt2").mkdir()
    for name in ("small.pt2", "none.pt2"):
        done = command("profile", str(artifacts / "plain"), "--against", name, "-q")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"model file '{name}' does not exist — give another --against, or none" in done.stderr
