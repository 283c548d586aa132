"""The GPU benchmark on a small model and the CPU, and what it does without a GPU."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("gpu")
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_exits_with_2() -> None:
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "there is no NVIDIA GPU that this PyTorch sees: nothing was run\n"


@pytest.mark.slow
def test_one_table_of_everything_that_ran_and_why_the_rest_did_not(gpu: ModuleType) -> None:
    configurations = (("eager", "fuse"), ("onnxruntime", "fuse,quant"), ("tensorrt", "fuse"))
    result = gpu.benchmark("cpu", ("test_resnet",), (1, 3), configurations, blocks=2)
    rows = {(row["what"], row["batch"]): row for row in result.table}
    assert rows["capture on cpu", ""]["note"] == "as the module computes"
    for what in ("eager-fp32", "eager fuse", "onnxruntime fuse,quant"):
        for batch in (1, 3):
            row = rows[what, batch]
            assert row["images/s"] == pytest.approx(batch / row["ms"] * 1e3)
    assert rows["tensorrt fuse", ""]["note"].startswith("not run: backend 'tensorrt' cannot run here")
    assert result.held, result.finding
    assert result.finding == "all of it did, but for what was not run"
    assert any(f"torch {torch.__version__}" in note for note in result.notes)


@pytest.mark.slow
def test_what_fails_is_in_the_table_and_the_finding(gpu: ModuleType) -> None:
    result = gpu.benchmark("cpu", ("test_resnet",), (1,), (("openvino", "no-such-pass"),), tests_passed=False, blocks=1)
    assert not result.held
    assert result.finding.startswith("failed: tests that need a GPU (see above); test_resnet openvino no-such-pass")
