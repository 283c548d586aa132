"""From a model to a pipeline and back, as users do it: partition, lower, save, load, compare."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import optc
from optc.lowering.artifact import load_artifact
from optc.lowering.pipeline_file import read_pipeline
from optc.lowering.pipeline_runner import PipelineRunner
from optc.passmanager.compare import compare
from optc.target import Target


def test_a_partitioned_quantized_model_is_saved_and_runs(
    residual_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``fuse,quant,partition`` on ONNX Runtime: int8 in both stages, with the plan in the artifact."""
    monkeypatch.setattr("optc.lowering.kernel_times.SECONDS", 0.01)  # how long layers take is not the point
    made = optc.optimize(
        residual_model,
        torch.randn(2, 8),
        "fuse,quant,partition",
        pass_options={"partition": {"stages": 2, "microbatches": 2}},
        backend="onnxruntime",
        calibration=[torch.randn(8, 8) for _ in range(4)],
        measure=False,
        target=Target(threads=2, batch=4),
    )
    assert made.report.backend == "pipeline"
    partition = next(record for record in made.program.history if record.name == "partition")
    assert partition.notes["verify"]["from_previous"]["sqnr_db"] > 60  # cut, and run stage by stage
    x = torch.randn(4, 8)
    (expected,) = made.program.run(x)

    path = made.save(tmp_path / "model.pipe")
    description = read_pipeline(path)
    assert description.backend == "onnxruntime"
    assert description.microbatches == 2
    assert [stage.predicted["device"] for stage in description.stages] == ["cpu:1", "cpu:1"]
    runner = load_artifact(path).runner()
    assert isinstance(runner, PipelineRunner)
    assert "int8" in runner.precision
    (found,) = runner(x.numpy())
    runner.close()
    assert compare([(expected,)], [(torch.from_numpy(found),)]).sqnr_db > 20
