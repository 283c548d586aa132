from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import optc
from optc.bench.inside import look_inside
from optc.bench.memory import artifact_memory, program_memory
from optc.errors import MeasurementError
from optc.lowering.artifact import load_artifact
from optc.target import Target

TARGET = Target(threads=1)
WIDTH = 4000


def test_weights_show_in_the_memory_of_the_process() -> None:
    program = optc.capture(nn.Linear(WIDTH, WIDTH, bias=False), (torch.randn(2, WIDTH),))
    found = program_memory(program, TARGET)
    weights = WIDTH * WIDTH * 4
    assert found.what == "eager float32"
    assert found.files >= weights
    assert found.query_peak - found.runtime > 0.9 * weights
    assert found.query_peak < found.runtime + 6 * weights  # nothing of this process is in it
    assert found.device is None


def test_inputs_that_are_no_batch_are_taken_as_they_are() -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return x @ mask

    program = optc.capture(Masked(), (torch.randn(2, 6), torch.randn(6, 6)), dynamic_batch=False)
    found = program_memory(program, TARGET)
    assert 0 < found.loaded <= found.query_peak


def test_an_artifact_takes_what_its_runtime_takes_and_a_broken_one_says_why(tmp_path: Path) -> None:
    inputs = torch.randn(2, 8)
    optimized = optc.optimize(nn.Linear(8, 4), inputs, "fuse", backend="eager", measure=False, target=TARGET)
    artifact = load_artifact(optimized.save(tmp_path / "made"))
    found = artifact_memory(artifact, TARGET)
    assert found.what == "eager"
    assert found.files == artifact.bytes
    assert 0 < found.runtime <= found.load_peak
    artifact.manifest.target["options"] = {"eager": {"keep_memory": "neither"}}
    with pytest.raises(MeasurementError, match="keep_memory"):
        artifact_memory(artifact, TARGET)  # with the options that it is run with
    artifact.manifest.target["options"] = {}
    (artifact.folder / "weights.safetensors").write_bytes(b"")
    with pytest.raises(MeasurementError, match=r"the memory of eager could not be measured: .*cannot read the graph"):
        artifact_memory(artifact, TARGET)


def test_what_cannot_be_looked_at_is_told(tmp_path: Path) -> None:
    inputs = torch.randn(2, 8)
    optimized = optc.optimize(nn.Linear(8, 4), inputs, "fuse", backend="null", measure=False, target=TARGET)
    artifact = load_artifact(optimized.save(tmp_path / "made"))
    inside = look_inside(artifact, None, (), Target(device="cuda", threads=1))
    assert inside.layers_after is None
    assert inside.layers_before is None
    assert inside.missing[0] == "the time of each layer is told on the CPU only, not on 'cuda'"


def test_the_graphs_costs_are_in_the_manifest(tmp_path: Path) -> None:
    inputs = torch.randn(2, 8)
    optimized = optc.optimize(nn.Linear(8, 4), inputs, "fuse", backend="eager", measure=False, target=TARGET)
    optimized.save(tmp_path / "made")
    (cost,) = json.loads((tmp_path / "made" / "manifest.json").read_text())["report"]["costs"]
    assert (cost["operator"], cost["operations"]) == ("aten.linear.default", 2 * 8 * 4)


def test_types_that_numpy_lacks_are_taken() -> None:
    program = optc.capture(nn.Linear(6, 4).bfloat16(), (torch.randn(2, 6).bfloat16(),))
    assert program_memory(program, TARGET).query_peak > 0
