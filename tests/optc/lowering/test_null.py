"""The null backend: zeros of the model's output shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from optc import Program, Target, capture
from optc.errors import BackendError
from optc.lowering.backend import Runner
from optc.lowering.null import NullBackend
from optc.plugins.registry import registry


def loaded(program: Program, folder: Path) -> Runner:
    lowered = NullBackend().lower(program, Target(), folder)
    return NullBackend().load(folder, lowered.files, Target())


def test_outputs_have_the_models_shapes_at_any_batch(block: Program, tmp_path: Path) -> None:
    runner = loaded(block, tmp_path)
    for batch in (1, 2, 9):
        outputs = runner(np.ones((batch, 3, 16, 16), np.float32))
        with torch.no_grad():
            expected = block.run(torch.ones(batch, 3, 16, 16))
        assert [out.shape for out in outputs] == [tuple(t.shape) for t in expected]
        assert all(out.dtype == np.float32 and not out.any() for out in outputs)


def test_a_fixed_dimension_that_equals_the_example_batch_stays(tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x.mean((0, 2)).view(2, 2), x.sum()

    runner = loaded(capture(Model(), (torch.randn(1, 4, 3),)), tmp_path)
    assert [out.shape for out in runner(np.ones((7, 4, 3), np.float32))] == [(2, 2), ()]


def test_says_that_nothing_runs(block: Program, tmp_path: Path) -> None:
    runner = loaded(block, tmp_path)
    assert (runner.provider, runner.precision) == ("null (no model runs)", "none")


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "shapes.json").write_text("{")
    with pytest.raises(BackendError, match="cannot read"):
        NullBackend().load(tmp_path, ("shapes.json",), Target())


def test_is_registered() -> None:
    assert registry().load("backend", "null") is NullBackend
