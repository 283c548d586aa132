"""What a look inside a model tells, and why not where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import optc
from optc.bench.inside import look_inside
from optc.lowering.artifact import load_artifact
from optc.lowering.eager import EagerBackend


@pytest.mark.usefixtures("known_peaks")
def test_a_bug_in_a_backends_profiler_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    made = optc.optimize(nn.Linear(8, 8).eval(), x, "fuse", backend="eager", measure=False)
    artifact = load_artifact(made.save(tmp_path / "linear"))

    def broken(*args: object) -> None:
        raise KeyError("counters")

    monkeypatch.setattr(EagerBackend, "profile", broken)
    inside = look_inside(artifact, None, (x,), optc.Target(threads=1))
    assert inside.layers_after is None
    assert "layers after: KeyError: 'counters'" in inside.missing
    assert len(inside.memory) == 1
