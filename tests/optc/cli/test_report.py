"""``--report`` and ``--layers``: what the commands write and show."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from optc.cli import profiling
from optc.cli.options import command_line, report_option, verbosity_options
from optc.lowering import kernel_times

Command = Callable[..., Any]
FACTORY = """
import torch
from torch import nn

def reported():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)), (torch.randn(1, 3, 8, 8),)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_peaks: None) -> Iterator[Path]:
    (tmp_path / "reported_model.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernel_times, "SECONDS", 0.01)
    monkeypatch.setattr(profiling, "ARTIFACT_SECONDS", 0.5)
    yield tmp_path
    sys.modules.pop("reported_model", None)


def test_optimize_writes_a_page_and_an_artifact_whose_layers_profile_shows(folder: Path, command: Command) -> None:
    options = ("--passes", "fuse", "--backend", "eager", "--no-measure", "-q", "--threads", "1")
    done = command("optimize", "reported_model:reported", *options, "-o", "made", "--report", "made.html")
    assert done.returncode == 0, done.stderr
    text = (folder / "made.html").read_text()
    assert "<h2>Where the time goes</h2>" in text
    assert "<h2>Memory</h2>" in text
    typed = "optc optimize reported_model:reported --passes fuse --backend eager -o made --threads 1 --no-measure"
    assert typed in text
    assert "quiet" not in text
    further = ("--against", "none", "--layers", "--report", "made.json", "--threads", "1", "-q")
    done = command("profile", "made", *further)
    assert done.returncode == 0, done.stderr
    assert "Where the time of made goes (eager)" in done.stdout
    assert "mkldnn._convolution" in done.stdout
    found = json.loads((folder / "made.json").read_text())["inside"]["made"]
    layers = {layer["nodes"][0]: layer for layer in found["layers_after"]["layers"] if layer["nodes"]}
    assert [layer["module"] for layer in layers.values()] == ["0", "3"]
    assert [memory["what"] for memory in found["memory"]] == ["eager"]


def test_a_report_of_another_kind_is_refused_before_anything_runs(folder: Path, command: Command) -> None:
    for name in ("optimize", "profile"):
        done = command(name, "no-such-model", "--report", "report.pdf")
        assert done.returncode == 2
        assert "a report is written as .html, .md, .json, not as 'report.pdf'" in done.stderr
    assert not list(folder.glob("report*.pdf"))


def typed(*arguments: str) -> str:
    """What :func:`command_line` makes of arguments."""
    found: list[str] = []

    @click.command("go")
    @click.argument("names", nargs=-1)
    @click.option("-O", "options", multiple=True)
    @click.option("--verify/--no-verify", default=True)
    @click.option("--limit", type=int, default=3)
    @report_option
    @verbosity_options
    def command(**_: object) -> None:
        found.append(command_line())

    call: Callable[..., object] = command.main
    call(list(arguments), prog_name="optc go", standalone_mode=False)
    return found[0]


def test_the_command_is_told_as_it_was_typed_without_what_only_shows() -> None:
    assert typed() == "optc go"
    assert typed("-v", "--report", "r.html", "a b", "c") == "optc go 'a b' c"
    assert typed("-O", "a.b=1", "-O", "c=x y", "--no-verify", "--limit", "3") == (
        "optc go -O a.b=1 -O 'c=x y' --no-verify --limit 3"
    )
