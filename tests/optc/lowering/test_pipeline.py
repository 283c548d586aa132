"""The pipeline backend: real processes over gloo that compute what the whole model does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import optc
from optc.lowering.backend import Runner
from optc.lowering.pipeline import PipelineBackend
from optc.lowering.pipeline_runner import PipelineRunner
from optc.program import Program
from optc.target import Target

Cut = Callable[[Program, int], Program]


def test_it_runs(residual_model: nn.Module, cut: Cut, tmp_path: Path) -> None:
    program = cut(optc.capture(residual_model, (torch.randn(2, 8),)), 3)
    backend = PipelineBackend(microbatches=2)
    target = Target(threads=3, batch=4)
    lowered = backend.lower(program, target, tmp_path)
    runner = backend.load(tmp_path, lowered.files, target)
    try:
        print(lowered.details, runner.provider, runner.precision)
        for batch in (4, 4, 1, 6, 7):
            x = torch.randn(batch, 8)
            np.testing.assert_allclose(runner(x.numpy())[0], program.run(x)[0].numpy(), rtol=1e-4, atol=1e-5)
    finally:
        runner.close()
