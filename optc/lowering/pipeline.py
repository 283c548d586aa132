"""The ``pipeline`` backend: a program's stages, each lowered by another backend and run by a process of its own."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optc.errors import BackendError
from optc.lowering.agreement import as_array, compare_with_graph
from optc.lowering.artifact import write_artifact
from optc.lowering.backend import Backend, Lowered, Runner
from optc.lowering.lowering import backends, kept
from optc.lowering.manifest import NAME as MANIFEST
from optc.lowering.manifest import sha256
from optc.lowering.pipeline_file import PipelineFile, StageEntry, WireEntry, read_pipeline, write_pipeline
from optc.lowering.pipeline_runner import PipelineRunner
from optc.stages import Stage, split, stage_count
from optc.target import Target

if TYPE_CHECKING:
    from optc.program import Program

DEFAULT = "eager"
"""What lowers the stages where nobody asks for anything else."""


class PipelineBackend(Backend):
    """Lowers each stage by a backend into a folder of its own; running starts one process a stage.

    Args:
        inside: the backend that lowers the stages.
        microbatches: parts that a batch goes through the stages in; by default what the partitioner planned, or 1.
    """

    name = "pipeline"
    summary = "One process for each stage of a partitioned model: torch.distributed over NCCL or gloo."
    automatic = False

    def __init__(self, inside: str = DEFAULT, microbatches: int | None = None) -> None:
        self.inside = inside
        self._microbatches = microbatches

    @classmethod
    def unavailable(cls, target: Target) -> str | None:
        """Why processes cannot talk to each other here."""
        if not torch.distributed.is_available():
            return "this PyTorch was built without torch.distributed: install another build"
        return None

    def lower(self, program: Program, target: Target, folder: Path) -> Lowered:
        """Lower each stage into ``stage-<i>/``, an artifact of its own; run the pipeline and compare with the program.

        ``details["check"]`` has the distance on each microbatch of the batch it was compared on.

        Raises:
            BackendError: the program has no stages, a stage cannot be lowered, a rank fails, or the pipeline computes
                something else than the program.
        """
        description, layers, files = self._lower_stages(program, target, folder)
        loaded = (write_pipeline(folder, description), *files)
        with _no_tf32() if target.device == "cuda" else nullcontext():
            runner = self.load(folder, loaded, target)
        try:
            rows = description.rows or max(1, target.batch // description.microbatches)
            check = _check(program, runner, description.microbatches, rows)
        finally:
            runner.close()
        count = len(description.stages)
        how = f"runs as several processes: torchrun --nproc-per-node {count} -m optc.distributed FOLDER"
        details = {"stages": layers, "check": check, "no_run_script": how}
        return Lowered(loaded, details, provider=runner.provider, precision=runner.precision)

    def _lower_stages(
        self, program: Program, target: Target, folder: Path
    ) -> tuple[PipelineFile, list[dict[str, Any]], list[str]]:
        """Lower each stage; returns what goes into ``pipeline.json``, details of each stage, and the files."""
        if stage_count(program) == 1:
            raise BackendError("the program has no stages", "add the pass partition: --passes partition")
        _check_outputs(program)
        backend = _ready(self.inside, target)
        account, planned = _account(program)
        _refuse_others(account, target)
        parts = self._microbatches or planned
        rows = max(1, target.batch // parts) if program.dynamic_batch else len(program.example_inputs[0])
        entries, layers, files = [], [], []
        for stage in split(program):
            predicted = account[stage.index] if len(account) == stage_count(program) else {}
            threads = _threads(str(predicted.get("device", ""))) or max(1, target.threads // stage_count(program))
            entry, details = _lower_stage(backend, stage, _target(target, threads, rows), folder, predicted)
            entries.append(entry)
            layers.append(details)
            files += sorted(
                path.relative_to(folder).as_posix() for path in (folder / entry.folder).rglob("*") if path.is_file()
            )
        description = PipelineFile(
            backend=backend.name,
            device=target.device,
            microbatches=parts,
            rows=None if program.dynamic_batch else rows,
            stages=tuple(entries),
        )
        return description, layers, files

    def load(self, folder: Path, files: tuple[str, ...], target: Target) -> Runner:
        """Start one process for each stage on this machine and wait until all are ready.

        Raises:
            BackendError: a rank fails; with its stage and last traceback.
            ArtifactError: ``pipeline.json`` is not valid.
        """
        description = read_pipeline(folder)
        if description.device != target.device:
            raise BackendError(
                f"the stages were lowered for {description.device}, not for {target.device}", "partition it again"
            )
        return PipelineRunner(folder, description, target)


def staged(program: Program, chosen: list[Backend], automatic: bool) -> list[Backend]:
    """The backends to lower to: for a program with stages the pipeline, around the backend asked for.

    Args:
        automatic: whether nobody asked for a backend; the stages are lowered by ``eager`` then.
    """
    if stage_count(program) == 1 or any(isinstance(each, PipelineBackend) for each in chosen):
        return chosen
    return [PipelineBackend(DEFAULT if automatic else chosen[0].name)]


def _ready(name: str, target: Target) -> Backend:
    if name == PipelineBackend.name:
        raise BackendError("a stage cannot be a pipeline itself", "lower the stages by eager, inductor or onnxruntime")
    (backend,), _ = backends(name, target)
    return backend


def _check_outputs(program: Program) -> None:
    """Refuse outputs that cannot be put together from those of microbatches.

    Raises:
        BackendError: an output's first dimension is not the batch, or a multiple of it.
    """
    batch = len(program.example_inputs[0])
    for index, output in enumerate(program.graph.output_node().args[0]):  # type: ignore[arg-type]
        sizes = list(output.meta["val"].shape)
        if not sizes or sizes[0] == 0 or sizes[0] % batch:
            raise BackendError(
                f"output {index} has the shape {sizes} at a batch of {batch}: it cannot be put together from those of"
                " microbatches",
                "leave it out of the model's outputs",
            )


def _target(target: Target, threads: int, rows: int) -> Target:
    return replace(target, threads=threads, batch=rows)


def _account(program: Program) -> tuple[Sequence[Mapping[str, Any]], int]:
    """What the partitioner noted of each stage, and into how many microbatches it divided the batch."""
    for record in reversed(program.history):
        if record.name == "partition":
            return record.notes.get("account", ()), int(record.options.get("microbatches") or 1)
    return (), 1


def _refuse_others(account: Sequence[Mapping[str, Any]], target: Target) -> None:
    """Refuse a plan for devices that the stages would not be lowered for.

    Raises:
        BackendError: names the first such device.
    """
    names = [str(row.get("device", "")) for row in account]
    other = next((name for name in names if target.device == "cpu" and _threads(name) is None), None)
    if other is not None:
        raise BackendError(
            f"the stages were planned for {other}, and lowering is for the CPU",
            "plan for 2xcpu:1 or the like, or lower with --device cuda where such GPUs are",
        )


def _threads(device: str) -> int | None:
    found = re.fullmatch(r"cpu:(\d+)", device)
    return int(found[1]) if found else None


def _lower_stage(
    backend: Backend, stage: Stage, target: Target, folder: Path, predicted: Mapping[str, Any]
) -> tuple[StageEntry, dict[str, Any]]:
    """Lower one stage into an artifact of its own and return its entry and what the backend had to say."""
    name = f"stage-{stage.index}"
    scratch = folder / f".{name}"
    scratch.mkdir()
    try:
        with kept({}, backend.name, backend.origin, alone=True):
            lowered = backend.lower(stage.program, target, scratch)
            # Its own, not the whole pipeline's: a rank reads no other manifest, and it says what int8 needs of the CPU.
            report = {"lowering": dict(lowered.details), "precision": lowered.precision}
            if not lowered.precision:
                with closing(backend.load(scratch, lowered.files, target)) as runner:
                    report["precision"] = runner.precision
        write_artifact(folder / name, scratch, lowered, stage.program, backend.name, report, target)
    except BackendError as error:
        raise BackendError(f"stage {stage.index}: {error.message}", error.hint) from error
    finally:
        shutil.rmtree(scratch)
    entry = StageEntry(
        folder=name,
        manifest_sha256=sha256(folder / name / MANIFEST),
        threads=target.threads,
        weight_bytes=stage.program.constant_bytes(),
        receives=tuple(map(WireEntry.of, stage.receives)),
        sends=tuple(map(WireEntry.of, stage.sends)),
        predicted=dict(predicted),
    )
    return entry, {"stage": stage.index, **lowered.details}


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Processes started meanwhile compute float32 as such, as the graph does that they are compared with.

    A variable of NVIDIA's libraries, which read it when they are loaded.
    """
    name, before = "NVIDIA_TF32_OVERRIDE", os.environ.get("NVIDIA_TF32_OVERRIDE")
    os.environ[name] = "0"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _check(program: Program, run: Runner, parts: int, rows: int) -> dict[str, Any]:
    """Compare the pipeline with the unsplit program on every microbatch of one batch.

    Every image of the batch is another one, so that a microbatch in the wrong place shows.

    Raises:
        BackendError: names the microbatch and output that differ by more than a correct runtime does.
    """
    batch = [_different(example, parts * rows) for example in program.example_inputs]
    outputs = run(*map(as_array, batch))
    found = []
    for part in range(parts):
        inputs = [tensor[part * rows : (part + 1) * rows] for tensor in batch]
        sizes = [len(each) // parts for each in outputs]
        mine = [each[part * size : (part + 1) * size] for each, size in zip(outputs, sizes, strict=True)]
        names = [f"{index} of microbatch {part}" for index in range(len(outputs))]
        found.append(compare_with_graph("pipeline", names, program, inputs, mine))
    if program.dynamic_batch:  # what is not batch first cannot be put together from the parts' outputs
        compare_with_graph("pipeline", [str(index) for index in range(len(outputs))], program, batch, outputs)
    worst = min(found, key=lambda each: each.sqnr_db)
    return {
        **worst.details(),
        "against": "the unsplit graph, microbatch by microbatch",
        "batches": [rows, parts * rows],
        "microbatches": [each.details()["sqnr_db"] for each in found],
    }


def _different(example: Tensor, batch: int) -> Tensor:
    """As many images as asked for, each shifted otherwise along the last axis."""
    example = example.detach().cpu()
    rows = [example[index % len(example)] for index in range(batch)]
    return torch.stack([row.roll(index, -1) if row.ndim else row for index, row in enumerate(rows)])
