"""``--allow-fallback`` from end to end, with a provider that runs nothing: AzureExecutionProvider."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime
import pytest

from optc.cli.main import run
from optc.lowering.onnxruntime import PROVIDERS

CPU, AZURE = "CPUExecutionProvider", "AzureExecutionProvider"
FACTORY = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()), (torch.randn(1, 3, 8, 8),)
"""

pytestmark = pytest.mark.skipif(
    AZURE not in onnxruntime.get_available_providers(), reason=f"this onnxruntime has no {AZURE}"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model, and the onnxruntime backend asking for Azure."""
    monkeypatch.setitem(PROVIDERS, "cpu", (AZURE, CPU))
    (tmp_path / "fallback_model.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("fallback_model", None)
    logging.disable(logging.NOTSET)


OPTIMIZE = ("optimize", "fallback_model:small", "--passes", "fuse", "--backend", "onnxruntime", "--no-measure", "-q")


def test_without_the_flag_it_fails_and_says_how_to_mend_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*OPTIMIZE, "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert f"another provider than {AZURE}" in error
    assert "--allow-fallback" in error
    assert not (folder / "out").exists()


@pytest.mark.usefixtures("briefly")
def test_with_the_flag_the_nodes_are_shown_and_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*OPTIMIZE, "-o", "out", "--allow-fallback"]) == 0
    shown = capsys.readouterr().out
    assert "Otherwise than asked (onnxruntime)" in shown
    assert f"on {CPU}" in shown
    manifest = json.loads((folder / "out" / "manifest.json").read_text())
    assert manifest["target"]["allow_fallback"] is True
    lowering = manifest["report"]["lowering"]
    assert [each["operator"] for each in lowering["fallback"]].count("Conv") == 1
    assert sum(lowering["providers"].values()) >= len(lowering["fallback"])
    assert manifest["report"]["provider"].startswith(f"onnxruntime {CPU} (")

    assert run(["profile", "out", "--against", "none", "--json", "-q"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert "--allow-fallback" in result["error"]
    assert run(["profile", "out", "--against", "none", "--json", "-q", "--allow-fallback"]) == 0
    (result,) = json.loads(capsys.readouterr().out)["results"]
    assert result["error"] is None
    assert result["provider"].startswith(f"onnxruntime {CPU} (")
