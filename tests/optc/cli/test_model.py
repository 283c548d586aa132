"""What a command makes of a model and its images, and of a reader that leaves."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from optc.cli.main import run

FACTORY = """
import torch
from torch import nn

def double():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return net.double(), (torch.randn(1, 3, 16, 16, dtype=torch.float64),)

def lazy():
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)), (torch.randn(1, 3, 16, 16),)
"""
OPTIONS = ("--passes", "fuse", "--backend", "eager", "--no-measure", "--json", "-o", "out", "-q")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("own", None)
    logging.disable(logging.NOTSET)


def test_images_have_the_models_own_type_of_floats(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", "own:double", "--data", "digits", *OPTIONS]) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 <= report["accuracy"]["after"] <= 1
    assert any("ImageNet's mean and std were assumed" in note for note in report["notes"])


def test_lazy_layers_take_the_sizes_of_the_example_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", "own:lazy", *OPTIONS]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["passes"]])
def test_output_that_nobody_reads_to_its_end_is_no_failure(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-m", "optc.cli.main", *arguments]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
