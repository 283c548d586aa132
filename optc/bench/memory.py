"""Memory of a model: measured in a fresh process, so that nothing else is in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optc.errors import MeasurementError
from optc.lowering.artifact import Artifact
from optc.lowering.graph_file import write_graph
from optc.lowering.pipeline_file import PIPELINE
from optc.program import Program
from optc.target import Target

CAPTURED = "captured"
"""Stands for a backend: the graph as it was captured, in plain eager PyTorch."""
EAGER = "eager float32"


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process that does nothing but load a model and answer queries, in bytes.

    Attributes:
        what: the backend, or :data:`EAGER` for the captured model.
        runtime: with the runtime's libraries imported, before the model is loaded.
        load_peak: the most while it is loaded; ``loaded`` when it is.
        query_peak: the most while queries are answered.
        device: what loading and answering took of the GPU's memory; ``None`` on the CPU.
        files: size of the files it is loaded from.
    """

    what: str
    runtime: int
    load_peak: int
    loaded: int
    query_peak: int
    device: int | None
    files: int


def artifact_memory(artifact: Artifact, target: Target) -> Memory:
    """The memory an artifact takes in its runtime.

    Raises:
        MeasurementError: the process failed; has its last line. Or it is a pipeline, which has several.
    """
    manifest, target = artifact.manifest, artifact.target(target)
    if PIPELINE in manifest.load:
        raise MeasurementError("the stages of a pipeline run in processes of their own, which are not weighed")
    inputs = [[[target.batch if size is None else size for size in e.shape], e.dtype] for e in manifest.inputs]
    return _measured(manifest.backend, artifact.folder, manifest.load, inputs, target, artifact.bytes)


def program_memory(program: Program, target: Target) -> Memory:
    """The memory a captured model takes in eager PyTorch.

    Raises:
        BackendError: it cannot be written as a graph file.
        MeasurementError: the process failed; has its last line.
    """
    inputs: list[list[Any]] = [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in program.example_inputs]
    if program.dynamic_batch:
        for shape, _ in inputs:
            shape[0] = target.batch
    with tempfile.TemporaryDirectory(prefix="optc-memory-") as folder:
        files = write_graph(program, Path(folder))
        total = sum(Path(folder, name).stat().st_size for name in files)
        return _measured(CAPTURED, Path(folder), files, inputs, target, total)


def _measured(
    backend: str, folder: Path, files: Sequence[str], inputs: list[list[Any]], target: Target, size: int
) -> Memory:
    asked = {"backend": backend, "folder": str(folder.absolute()), "files": list(files), "inputs": inputs}
    command = [sys.executable, "-P", "-m", "optc.bench.memory_process", json.dumps(asked | {"target": asdict(target)})]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise MeasurementError(
            f"the memory of {backend} could not be measured: {said}",
            "is there enough of it?" if done.returncode < 0 else "",
        ) from None
    return Memory(what=EAGER if backend == CAPTURED else backend, files=size, **found)
