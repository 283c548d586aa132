"""The GPU benchmark on a small model and the CPU, and what it does without a GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from optc.bench.results import Block, Candidate, CandidateResult
from optc.frontend.load import load_model

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


@pytest.mark.parametrize(
    ("error", "nonfinite", "note"),
    [
        (None, (0, 3), "failed: 3 of 128 queries returned NaN"),
        ("no memory", (0,), "failed: no memory"),
        (None, (0,), ""),
    ],
)
def test_what_fails_late_or_gives_no_numbers_has_failed(
    gpu: ModuleType, error: str | None, nonfinite: tuple[int, ...], note: str
) -> None:
    blocks = tuple(Block((1_000_000,) * 64, count, None) for count in nonfinite)  # type: ignore[arg-type]
    candidate = Candidate("eager fuse", "float32", False, lambda: pytest.fail("opened"))
    result = CandidateResult.of(candidate, "eager", "float32", 0.0, blocks, error)
    row = gpu._measured("model", result, 1, True)
    assert row["note"].startswith(note)
    assert row["ms"] == ("" if note else 1.0)


def test_a_model_and_a_batch_that_fail_are_rows_and_the_rest_goes_on(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "load_model", lambda name, weights: load_model(name))  # ReLU has none
    monkeypatch.setattr(gpu, "measure", lambda *arguments, **options: 1 / 0)
    result = gpu.benchmark("cpu", ("no_such_model", "torch.nn:ReLU"), (1, 2), (), unfinished=tmp_path / "found.json")
    found = [(row["model"], row["what"], row["batch"]) for row in result.table if row["note"].startswith("failed: ")]
    assert found == [
        ("no_such_model", "all of it", ""),
        ("torch.nn:ReLU", "all of it", 1),
        ("torch.nn:ReLU", "all of it", 2),
    ]
    assert not result.held
    assert json.loads((tmp_path / "found.json").read_text())["table"] == result.table


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
