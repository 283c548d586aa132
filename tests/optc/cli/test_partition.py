"""``optc partition`` as users run it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import optc
from optc.lowering.pipeline_file import read_pipeline

Command = Callable[..., Any]
RESIDUALS = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(48), nn.Linear(48, 192), nn.Linear(192, 48)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

def residuals():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(6)), nn.Linear(48, 10)), (torch.randn(1, 48),)
"""
MODEL = "mine_in_stages:residuals"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "mine_in_stages.py").write_text(RESIDUALS)
    monkeypatch.setattr("optc.lowering.kernel_times.SECONDS", 0.01)  # how long layers take is not the point
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("mine_in_stages", None)


def test_a_simulation_needs_no_device(command: Command) -> None:
    done = command("partition", MODEL, "--simulate", "3xh100,1xa100", "--microbatches", "6", "-q")
    assert done.returncode == 0, done.stderr
    assert "Stages, for one microbatch" in done.stdout
    assert "One batch" in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.split()[:2] == ["3", "a100"]]
    assert len(rows) == 1
    drawn = [line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ", "2 ", "3 ") and "·" in line]
    assert len(drawn) == 4
    assert drawn[0].endswith("·")  # the first stage waits in the end, the last one in the beginning
    assert drawn[3].startswith("3 ·")
    assert "Times are rooflines" in done.stdout
    assert "The pipeline has" in done.stdout


def test_json_and_the_report_say_the_same(command: Command, folder: Path) -> None:
    options = ("--simulate", "2xl4", "--microbatches", "4", "--batch", "8", "--report", "plan.html", "-q", "--json")
    done = command("partition", MODEL, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["images"], found["microbatches"], len(found["stages"])) == (8, 4, 2)
    kinds = ("receive_seconds", "compute_seconds", "send_seconds")
    slowest = max(sum(stage[kind] for kind in kinds) for stage in found["stages"])
    assert found["period_seconds"] == pytest.approx(slowest)
    assert found["throughput"] == pytest.approx(8 / found["latency_seconds"])
    assert found["speedup"] == pytest.approx(found["one_device"]["latency_seconds"] / found["latency_seconds"])
    assert 0 < found["ideal_bubble"] <= found["bubble"] < 1
    page = (folder / "plan.html").read_text()
    assert found["stages"][0]["cut"][0]["name"] in page
    assert page.count("<svg") == 1


def test_a_plan_is_verified_lowered_and_runs(command: Command, folder: Path) -> None:
    options = ("--stages", "2", "--microbatches", "2", "--passes", "fuse", "--threads", "2", "-o", "two.pipe")
    done = command("partition", MODEL, *options, "-q", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["timing"] == "measured"
    assert [stage["device"] for stage in found["stages"]] == ["cpu:1", "cpu:1"]
    assert all(stage["compute_seconds"] > 0 for stage in found["stages"])
    manifest = json.loads((folder / "two.pipe" / "manifest.json").read_text())
    record = manifest["report"]["passes"][-1]
    assert (record["name"], record["notes"]["verify"]["exact"]) == ("partition", True)
    import mine_in_stages

    model, _ = mine_in_stages.residuals()
    images = torch.randn(4, 48)
    with torch.no_grad():
        expected = model.eval()(images).numpy()
    runner = optc.load(folder / "two.pipe")
    try:
        np.testing.assert_allclose(runner(images.numpy())[0], expected, rtol=1e-4, atol=1e-5)
    finally:
        runner.close()


def test_a_file_for_one_batch_size_is_planned_and_what_capture_gave_up_is_told(command: Command) -> None:
    import mine_in_stages

    model, inputs = mine_in_stages.residuals()
    torch.export.save(torch.export.export(model.eval(), inputs), "one.pt2")
    done = command("partition", "one.pt2", "--stages", "2", "--threads", "2", "-q", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["stages"]) == 2
    assert found["artifact"] is None
    assert any("batch" in note for note in found["notes"]), found["notes"]


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 5])
def test_a_file_for_one_batch_size_is_cut_into_stages_for_that(command: Command, batch: int) -> None:
    import mine_in_stages

    model, inputs = mine_in_stages.residuals()
    several = tuple(torch.cat([each] * batch) for each in inputs)
    torch.export.save(torch.export.export(model.eval(), several), "one.pt2")
    options = ("--stages", "2", "--microbatches", "3", "--threads", "2", "-o", "one.pipe", "-q")
    done = command("partition", "one.pt2", *options)
    assert done.returncode == 0, done.stderr
    assert "torchrun --nproc-per-node 2 -m optc.distributed one.pipe" in " ".join(done.stdout.split())
    assert read_pipeline(Path("one.pipe")).rows == batch


def test_one_stage_is_an_ordinary_artifact(command: Command) -> None:
    done = command("partition", MODEL, "--stages", "1", "--backend", "eager", "-o", "one", "-q")
    assert done.returncode == 0, done.stderr
    assert "Artifact: one (optc profile one)" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--simulate", "2xh100", "--devices", "2xcpu:1"), "--devices and --simulate both name devices"),
        (("--simulate", "2xh100", "-o", "x.pipe"), "there is nothing to lower"),
        (("--simulate", "2xv100"), "unknown device 'v100'"),
        (("--simulate", "2xh100", "--microbatches", "3", "--batch", "8"), "3 microbatches do not divide a batch of 8"),
        (("--simulate", "99xh100"), "99 stages for 31 operators"),
        (("--simulate", "2xh100", "--stages", "3"), "2 devices ('2xh100') for 3 stages"),
        (("--simulate", "tiny.toml"), "too large for its device"),
        (("--devices", "2xh100", "-o", "x.pipe"), "the stages were planned for h100, and lowering is for the CPU"),
        (("--backend", "eager"), "without -o no stage is lowered, to eager or otherwise"),
        (("--backend", "nope", "-o", "x.pipe"), "unknown backend 'nope'"),
        (("-o", "mine_in_stages.py"), "output folder 'mine_in_stages.py' exists"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    command: Command, folder: Path, options: tuple[str, ...], message: str
) -> None:
    (folder / "tiny.toml").write_text('[[device]]\nname = "tiny"\nbase = "l4"\ncount = 2\nmemory_gb = 1e-4\n')
    done = command("partition", MODEL, *options, "-q")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(folder.glob("*.pipe"))
