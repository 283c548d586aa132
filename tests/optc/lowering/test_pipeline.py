"""The pipeline backend: real processes over gloo that compute what the whole model does."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import nn

import optc
from optc.errors import ArtifactError, BackendError
from optc.lowering.artifact import load_artifact, write_artifact
from optc.lowering.backend import Array, Runner
from optc.lowering.pipeline import PipelineBackend, _check, staged
from optc.lowering.pipeline_file import PipelineFile, read_pipeline
from optc.lowering.pipeline_ranks import local_store
from optc.lowering.pipeline_runner import PipelineRunner, stage_targets
from optc.program import Program, complete_meta
from optc.rewrite import add_constant
from optc.target import Target
from optc.torchvision_ops import declare_torchvision_ops

Cut = Callable[[Program, int], Program]
TARGET = Target(threads=2, batch=4)


class Kept(PipelineBackend):
    """Leaves open what it compared the pipeline with: each start of the ranks takes seconds."""

    runner: PipelineRunner

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> PipelineRunner:
        self.runner = super().load(folder, files, target)
        self.runner.close = lambda: None  # type: ignore[method-assign]
        return self.runner


class Made:
    """A small ViT in two stages as an artifact, and the program it was made from."""

    def __init__(self, cut: Cut, folder: Path) -> None:
        declare_torchvision_ops()  # before timm imports torchvision
        import timm

        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=7).eval()
        self.program = cut(optc.capture(model, (torch.randn(2, 3, 32, 32),)), 2)
        made = folder / "made"
        made.mkdir()
        backend = Kept(microbatches=2)
        self.lowered = backend.lower(self.program, TARGET, made)
        self.runner = backend.runner
        self.path = folder / "vit.pipe"
        write_artifact(self.path, made, self.lowered, self.program, "pipeline", {"precision": "float32"}, TARGET)


@pytest.fixture(scope="module")
def made(cut: Cut, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    made = Made(cut, tmp_path_factory.mktemp("pipeline"))
    yield made
    PipelineRunner.close(made.runner)


@pytest.fixture(scope="module")
def runner(made: Made) -> PipelineRunner:
    return made.runner


def test_every_batch_size_computes_what_the_whole_model_does(made: Made, runner: PipelineRunner) -> None:
    for batch in (4, 4, 1, 6, 7, 2, 8):  # more sizes than are kept, in one microbatch where two do not divide it
        x = torch.randn(batch, 3, 32, 32)
        (found,) = runner(x.numpy())
        np.testing.assert_allclose(found, made.program.run(x)[0].numpy(), rtol=1e-4, atol=1e-5)


def test_it_was_checked_on_every_microbatch_when_it_was_made(made: Made) -> None:
    check = made.lowered.details["check"]
    assert len(check["microbatches"]) == 2
    assert check["bound_db"] == 60.0
    assert all(each == "inf" or each > 60.0 for each in check["microbatches"])


def test_the_runner_tells_what_runs_and_each_rank_holds_its_share(made: Made, runner: PipelineRunner) -> None:
    assert runner.provider.startswith("pipeline of 2 ranks over gloo: eager cpu")
    assert runner.precision == "float32"
    assert len(set(runner.pids)) == 2
    runner(np.zeros((2, 3, 32, 32), np.float32))
    for memory, rank, stage in zip(runner.memory(), runner.ranks, read_pipeline(made.path).stages, strict=True):
        assert memory.peak_bytes > memory.allocated_bytes > rank.base_bytes + stage.weight_bytes / 2


def test_stages_are_artifacts_of_their_own_with_their_own_weights(made: Made) -> None:
    description = read_pipeline(made.path)
    assert [entry.folder for entry in description.stages] == ["stage-0", "stage-1"]
    whole = made.program.constant_bytes()
    weights = [(made.path / entry.folder / "weights.safetensors").stat().st_size for entry in description.stages]
    assert all(0 < size < 0.75 * whole for size in weights)
    assert sum(weights) == pytest.approx(whole, rel=0.02)
    x = np.zeros((2, 3, 32, 32), np.float32)
    first, second = (load_artifact(made.path / entry.folder).runner() for entry in description.stages)
    handed_on = first(x)
    assert [list(each.shape[1:]) for each in handed_on] == [list(w.shape[1:]) for w in description.stages[0].sends]
    np.testing.assert_allclose(second(*handed_on)[0], made.program.run(torch.zeros(2, 3, 32, 32))[0], atol=1e-5)


def test_the_store_is_reached_from_this_machine_alone() -> None:
    store = local_store(1, 5.0)
    socket.create_connection(("127.0.0.1", store.port), timeout=5.0).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=5.0).close()


def test_wrong_inputs_are_refused_and_the_next_query_is_answered(made: Made, runner: PipelineRunner) -> None:
    with pytest.raises(BackendError, match=r"has the shape \(2, 3, 16, 16\), the model takes \(batch, 3, 32, 32\)"):
        runner(np.zeros((2, 3, 16, 16), np.float32))
    with pytest.raises(BackendError, match="takes 1 inputs, not 2"):
        runner(np.zeros((2, 3, 32, 32), np.float32), np.zeros(2, np.float32))
    assert runner(np.zeros((2, 3, 32, 32), np.float32))[0].shape == (2, 7)


@pytest.mark.slow
def test_stages_are_compiled(residual_model: nn.Module, cut: Cut, tmp_path: Path) -> None:
    program = cut(optc.capture(residual_model, (torch.randn(2, 8),)), 2)
    lowered = PipelineBackend("inductor", microbatches=2).lower(program, TARGET, tmp_path)  # compares the outputs
    assert read_pipeline(tmp_path).backend == "inductor"
    assert float(lowered.details["check"]["sqnr_db"]) > 60.0
    assert "stage-1/model.pt2" in lowered.files


@pytest.mark.gpu
def test_stages_on_gpus(residual_model: nn.Module, cut: Cut, tmp_path: Path) -> None:
    """NCCL where each rank has a GPU for itself; two stages on one GPU go through the host's memory over gloo."""
    program = cut(optc.capture(residual_model, (torch.randn(2, 8),)), 2)
    target = Target(device="cuda", batch=4)
    backend = PipelineBackend(microbatches=2)
    lowered = backend.lower(program, target, tmp_path)
    runner = backend.load(tmp_path, lowered.files, target)
    assert isinstance(runner, PipelineRunner)
    try:
        assert {rank.transport for rank in runner.ranks} == {"nccl" if torch.cuda.device_count() > 1 else "gloo"}
        x = torch.randn(4, 8)
        np.testing.assert_allclose(runner(x.numpy())[0], program.run(x)[0].numpy(), rtol=1e-3, atol=1e-3)
    finally:
        runner.close()


class Half(nn.Module):
    """Takes types that numpy has not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.model(x + y.bfloat16())


def test_bfloat16_goes_from_stage_to_stage_as_it_is(residual_model: nn.Module, cut: Cut, tmp_path: Path) -> None:
    inputs = torch.randn(2, 8).bfloat16(), torch.randn(2, 8).to(torch.float8_e4m3fn)
    program = cut(optc.capture(Half(residual_model), inputs), 2)
    lowered = PipelineBackend(microbatches=2).lower(program, TARGET, tmp_path)  # compares the outputs
    assert lowered.details["check"]["bound_db"] == 30.0
    first = read_pipeline(tmp_path).stages[0]
    assert {wire.dtype for wire in first.sends} == {"bfloat16"}
    assert [wire.dtype for wire in first.receives] == ["bfloat16", "float8_e4m3fn"]


class Amplifies(nn.Module):
    """Quantized, and a hundred thousand times more sensitive to its input than that is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = torch.ops.quantized_decomposed
        integers = q.quantize_per_tensor(torch.sin(1.5e5 * x), 1 / 127, 0, -128, 127, torch.int8)
        return q.dequantize_per_tensor(integers, 1 / 127, 0, -128, 127, torch.int8)


def test_a_pipeline_is_held_to_the_graphs_own_steadiness_as_its_stages_are() -> None:
    program = optc.capture(Amplifies().eval(), (torch.randn(2, 512, generator=torch.Generator().manual_seed(1)),))

    class OtherRounding(Runner):
        def __call__(self, *inputs: Array) -> tuple[Array, ...]:
            noise = np.random.default_rng(2).standard_normal(inputs[0].shape)
            (output,) = program.run(torch.from_numpy(inputs[0] * (1 + 2.0**-20 * noise)).float())
            return (output.numpy(),)

    check = _check(program, OtherRounding(), 2, 2)
    assert 10.0 <= check["bound_db"] < 20.0


def test_a_fixed_batch_is_a_microbatch(residual_model: nn.Module, cut: Cut, tmp_path: Path) -> None:
    program = cut(optc.capture(residual_model, (torch.randn(2, 8),), dynamic_batch=False), 2)
    lowered = PipelineBackend(microbatches=2).lower(program, TARGET, tmp_path)  # compares two microbatches
    assert len(lowered.details["check"]["microbatches"]) == 2
    description = read_pipeline(tmp_path)
    assert (description.rows, description.parts(6)) == (2, 3)
    with pytest.raises(ArtifactError, match="2 images at a time, which do not divide a batch of 5"):
        description.parts(5)


def test_what_has_no_stages_is_refused(residual_model: nn.Module, cut: Cut, tmp_path: Path) -> None:
    program = optc.capture(residual_model, (torch.randn(2, 8),))
    with pytest.raises(BackendError, match="no stages — add the pass partition"):
        PipelineBackend().lower(program, TARGET, tmp_path)
    with pytest.raises(BackendError, match="a stage cannot be a pipeline itself"):
        PipelineBackend("pipeline").lower(cut(program, 2), TARGET, tmp_path)


class Mean(nn.Module):
    """One output for each image, one for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.layer(x))
        return x, x.mean()


def test_an_output_of_the_whole_batch_is_refused(cut: Cut, tmp_path: Path) -> None:
    program = cut(optc.capture(Mean(), (torch.randn(2, 8),)), 2)
    with pytest.raises(BackendError, match=r"output 1 has the shape \[\] at a batch of 2: it cannot be put together"):
        PipelineBackend(microbatches=2).lower(program, TARGET, tmp_path)


def test_a_wrong_pipeline_is_found_out(residual_model: nn.Module, cut: Cut, tmp_path: Path) -> None:
    """What the check is for: stages of another model."""
    program = optc.capture(residual_model, (torch.randn(2, 8),))

    class Wrong(PipelineBackend):
        def _lower_stages(self, program: Program, target: Target, folder: Path) -> Any:
            other = program.fork()
            weight = next(node for node in other.graph.nodes if node.op == "get_attr" and node.name.endswith("weight"))
            changed = dict(other.constants())[str(weight.target)].detach() * 1.05
            weight.replace_all_uses_with(add_constant(other, weight, "changed", changed))
            complete_meta(other)
            return super()._lower_stages(other, target, folder)

    with pytest.raises(BackendError, match="pipeline computes output '0 of microbatch 0' differently"):
        Wrong(microbatches=2).lower(cut(program, 2), TARGET, tmp_path)


def test_a_staged_program_is_lowered_by_the_backend_asked_for(residual_model: nn.Module, cut: Cut) -> None:
    from optc.lowering.eager import EagerBackend
    from optc.lowering.onnxruntime import OnnxRuntimeBackend

    program = optc.capture(residual_model, (torch.randn(2, 8),))
    asked = [OnnxRuntimeBackend()]
    assert staged(program, asked, False) is asked
    (into,) = staged(cut(program, 2), asked, False)
    assert isinstance(into, PipelineBackend)
    assert into.inside == "onnxruntime"
    (into,) = staged(cut(program, 2), [*asked, EagerBackend()], True)
    assert isinstance(into, PipelineBackend)
    assert into.inside == "eager"


def test_threads_are_shared_out_as_planned(made: Made) -> None:
    plan = read_pipeline(made.path)
    first, second = plan.stages
    stages = (first.model_copy(update={"threads": 1}), second.model_copy(update={"threads": 3}))
    uneven = plan.model_copy(update={"stages": stages})
    assert [each.threads for each in stage_targets(uneven, Target(threads=4))] == [1, 3]
    assert [each.threads for each in stage_targets(uneven, Target(threads=8))] == [2, 6]
    assert [each.threads for each in stage_targets(uneven, Target(threads=1))] == [1, 1]
    assert [each.batch for each in stage_targets(uneven, Target(threads=4, batch=8))] == [4, 4]


def test_an_altered_pipeline_is_refused(made: Made, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(made.path, tmp_path / "copy")
    document = json.loads((copy / "pipeline.json").read_text())
    document["stages"].reverse()
    (copy / "pipeline.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match="altered"):
        read_pipeline(copy)
    with pytest.raises(ArtifactError, match=r"pipeline.json has \d+ bytes|altered"):
        load_artifact(copy)
    (copy / "manifest.json").unlink()
    assert isinstance(read_pipeline(copy), PipelineFile)
    document["stages"][0]["folder"] = "../elsewhere"
    (copy / "pipeline.json").write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=r"is not valid: stages\.0\.folder"):
        read_pipeline(copy)
    (copy / "pipeline.json").unlink()
    with pytest.raises(ArtifactError, match="is no pipeline: it has no"):
        read_pipeline(copy)


def test_callers_in_several_threads_get_their_own_outputs(made: Made, runner: PipelineRunner) -> None:
    images = torch.randn(6, 4, 3, 32, 32)
    expected = [made.program.run(each)[0] for each in images]
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(lambda each: runner(each.numpy())[0], images))
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-3, atol=1e-4)


def test_each_stage_says_what_it_computes_in(made: Made) -> None:
    stages = [load_artifact(folder) for folder in sorted(made.path.glob("stage-*"))]
    assert [stage.precision for stage in stages] == ["float32", "float32"]


def test_outputs_that_are_not_batch_first_are_refused(cut: Cut, tmp_path: Path) -> None:
    class TimeFirst(nn.Module):
        """As OCR models return scores: time before the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).relu()).transpose(0, 1)

    program = cut(optc.capture(TimeFirst().eval(), (torch.randn(2, 6, 8),)), 2)
    with pytest.raises(BackendError, match=r"pipeline computes output '0' differently .*: its shape is \(12, 2, 8\)"):
        PipelineBackend(microbatches=2).lower(program, TARGET, tmp_path)
