"""What is imported when: listing and helping must be instant, so they import no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "torchvision",
    "torchao",
    "timm",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "numpy",
    "scipy",
    "sklearn",
    "PIL",
)


def heavy_modules_after(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has imported after running ``code``."""
    report = f"import json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    modules: list[str] = json.loads(done.stdout.splitlines()[-1])
    return modules


@pytest.mark.parametrize("module", ["optc", "optc.builtin", "optc_passes", "optc.cli.main"])
def test_importing_imports_nothing_heavy(module: str) -> None:
    assert heavy_modules_after(f"import {module}") == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["passes"], ["optimize", "--help"], ["profile", "--help"]]
)
def test_the_command_answers_without_anything_heavy(arguments: list[str]) -> None:
    assert heavy_modules_after(f"from optc.cli.main import run\nassert run({arguments!r}) == 0") == []


def test_the_check_itself_sees_torch() -> None:
    assert "torch" in heavy_modules_after("import torch")
