"""Commands run in this process, which has imported torch already, and what they print."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from optc.cli.main import run

SMALL = """
import torch
from torch import nn

def small():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(8, 10)), (torch.randn(1, 3, 16, 16),)
"""


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The ``optc`` command."""

    def command(*arguments: str) -> Done:
        code = run(list(arguments))
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    yield command
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two artifacts of one small model, ``plain`` and ``fused``, for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("artifacts")
    source = tmp_path_factory.mktemp("source")
    (source / "small_model.py").write_text(SMALL)
    sys.path.insert(0, str(source))
    try:
        for name, passes in (("plain", "remove-identity"), ("fused", "fuse")):
            options = ("--passes", passes, "--backend", "onnxruntime", "--no-measure", "-q")
            assert run(["optimize", "small_model:small", *options, "-o", str(folder / name)]) == 0
    finally:
        sys.path.remove(str(source))
        logging.disable(logging.NOTSET)
    return folder


@pytest.fixture
def for_a_gpu(artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The artifact ``made`` in the current folder, which says that it was made for a GPU."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(artifacts / "plain", "made")
    manifest = json.loads(Path("made/manifest.json").read_text())
    manifest["target"]["device"] = "cuda"
    Path("made/manifest.json").write_text(json.dumps(manifest))
