from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optc
from optc.api import Optimized
from optc.bench.baselines import baselines
from optc.bench.inside import Inside, look_inside
from optc.bench.measure import measure
from optc.bench.peaks import Peaks
from optc.bench.peaks_cache import peaks_file
from optc.bench.results import Candidate
from optc.lowering import kernel_times
from optc.lowering.artifact import load_artifact
from optc.report.document import Document
from optc.report.optimized import optimized_document
from optc.report.report import Accuracy, Report
from optc.target import Target

TARGET = Target(threads=1)
COMMAND = "optc optimize net --backend onnxruntime -o 'net <int8>'"


class Net(nn.Module):
    """A small convolutional network whose layers have names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 32, 3, stride=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body(x)).mean((2, 3))
        return self.head(x)


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Optimized, Path, Inside]:
    """A real run on a small network, its artifact, and what is inside."""
    pytest.importorskip("onnxruntime")
    known = Peaks(1, {"float32": 50e9, "bfloat16": 200e9, "int8": 400e9}, ((2**18, 80e9), (2**28, 20e9)), "earlier")
    file = peaks_file(1)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(known)))  # measuring them takes seconds
    torch.manual_seed(0)
    model, inputs = Net().eval(), torch.randn(2, 3, 32, 32)
    optimized = optc.optimize(
        model, inputs, backend="onnxruntime", calibration=[inputs] * 4, measure=False, target=TARGET
    )
    artifact = optimized.save(tmp_path_factory.mktemp("report") / "net")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_times, "SECONDS", 0.01)
        return optimized, artifact, look_inside(load_artifact(artifact), model, (inputs,), TARGET)


@pytest.fixture(scope="session")
def report(run: tuple[Optimized, Path, Inside]) -> Report:
    """The run's report, with a short measurement against eager PyTorch."""
    optimized, _, _ = run
    inputs = torch.randn(1, 3, 32, 32)
    candidates = baselines(Net().eval(), (inputs,), TARGET)[:2]
    candidates += [Candidate("optc", "int8", True, optimized.load), Candidate("broken", "", False, _broken)]
    query = [(np.asarray(inputs),)]
    measured = measure(candidates, query, TARGET, optimized="optc", blocks=2, block_seconds=0.02)
    return replace(optimized.report, measurement=measured, accuracy=Accuracy(0.93, 0.92, "some data"))


@pytest.fixture(scope="session")
def document(run: tuple[Optimized, Path, Inside], report: Report) -> Document:
    _, artifact, inside = run
    return optimized_document(report, artifact, [COMMAND], inside)


def _broken() -> optc.Runner:
    raise RuntimeError("it does <b>not</b> open | ever")
