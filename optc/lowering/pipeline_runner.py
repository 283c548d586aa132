"""A loaded pipeline: this process hands queries to the first rank and takes the last one's outputs."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from optc.errors import ArtifactError, BackendError
from optc.lowering.backend import Array, Runner
from optc.lowering.inputs import check_inputs
from optc.lowering.pipeline_channel import array_dtype
from optc.lowering.pipeline_file import PipelineFile
from optc.lowering.pipeline_ranks import LocalRanks
from optc.target import Target


@dataclass(frozen=True)
class RankFacts:
    """What a rank told when it was ready.

    Attributes:
        provider, precision: of its stage's runner.
        transport: ``"nccl"`` or ``"gloo"``.
        base_bytes: memory it had allocated before it read its stage.
    """

    provider: str
    precision: str
    transport: str
    base_bytes: int


@dataclass(frozen=True)
class RankMemory:
    """Memory of a rank.

    Attributes:
        allocated_bytes: now, without what is mapped from files: libraries, and weights as long as they are read.
        peak_bytes: the most that was resident at once, mapped files included.
    """

    allocated_bytes: int
    peak_bytes: int


class PipelineRunner(Runner):
    """One process a stage. A batch goes through in as many microbatches as planned, or fewer if they do not divide it.

    Attributes:
        ranks: what each rank told.
    """

    def __init__(self, folder: Path, description: PipelineFile, target: Target) -> None:
        self._description = description
        self._inputs = [entry.wire for entry in description.stages[0].receives]
        self._one_at_a_time = threading.Lock()  # callers in several threads would mix up their bytes
        self._processes = LocalRanks(folder, stage_targets(description, target))
        try:
            self.ranks = tuple(RankFacts(**self._answer(rank)) for rank in range(len(description.stages)))
        except BaseException:
            self.close()
            raise
        providers = dict.fromkeys(rank.provider for rank in self.ranks)
        self.provider = f"pipeline of {len(self.ranks)} ranks over {self.ranks[0].transport}: {', '.join(providers)}"
        self.precision = _joined([rank.precision for rank in self.ranks])

    @property
    def pids(self) -> list[int]:
        """The process of each rank."""
        return self._processes.pids

    def memory(self) -> list[RankMemory]:
        """What each rank takes; 0 where the system does not tell."""
        return [RankMemory(memory_bytes("RssAnon", pid), memory_bytes("VmHWM", pid)) for pid in self.pids]

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        arrays = self._checked(inputs)
        with self._one_at_a_time:
            return self._run(arrays)

    def _run(self, arrays: Sequence[Array]) -> tuple[Array, ...]:
        if self._processes.failure:
            self._processes.raise_failure()
        batch = len(arrays[0])
        header = {"batch": batch, "microbatches": self._description.parts(batch)}
        try:
            for connection in self._processes.connections:
                connection.send(header)
            for array in arrays:
                self._processes.connections[0].send_array(array)
            outputs = self._outputs()
        except (EOFError, OSError):
            self._processes.raise_failure()
            raise
        except BaseException:
            self._processes.abandon("a query was interrupted, and the pipeline was ended")
            raise
        if self._processes.failure:
            self._processes.raise_failure()
        return outputs

    def _checked(self, inputs: Sequence[Array]) -> list[Array]:
        check_inputs(inputs, [{"name": wire.name, "shape": (None, *wire.shape[1:])} for wire in self._inputs])
        if not len(inputs[0]):
            raise BackendError("a pipeline takes one sample or more, not an empty batch")
        wires = zip(inputs, self._inputs, strict=True)
        return [np.ascontiguousarray(array, array_dtype(wire.dtype)) for array, wire in wires]

    def _outputs(self) -> tuple[Array, ...]:
        told = self._answer(len(self._description.stages) - 1)
        outputs = []
        for shape, dtype in told["outputs"]:
            array = np.empty(shape, dtype)
            self._processes.connections[-1].receive_into(array)
            outputs.append(array)
        return tuple(outputs)

    def _answer(self, rank: int) -> dict[str, Any]:
        try:
            return self._processes.connections[rank].receive()
        except (EOFError, OSError):
            self._processes.raise_failure()
            raise

    def close(self) -> None:
        """End the processes."""
        with suppress(OSError):
            self._processes.close()


def memory_bytes(what: str, pid: int | str = "self") -> int:
    """What Linux says of a process's memory under a name such as ``RssAnon``; 0 where the system does not tell."""
    with suppress(OSError):
        found = re.search(rf"{what}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


def stage_targets(description: PipelineFile, target: Target) -> list[Target]:
    """What each stage runs with: the planned threads, or their share of as many as ``target`` has.

    Raises:
        ArtifactError: the batch is no multiple of a fixed microbatch.
    """
    try:
        parts = description.parts(target.batch)
    except ArtifactError:
        parts = 1
    rows = description.rows or max(1, target.batch // parts)
    total = description.threads
    threads = [
        stage.threads if target.threads == total else max(1, target.threads * stage.threads // total)
        for stage in description.stages
    ]
    return [replace(target, threads=each, batch=rows) for each in threads]


def _joined(precisions: Sequence[str]) -> str:
    """What the stages compute in, once where it is the same in all."""
    different = list(dict.fromkeys(each for each in precisions if not each.startswith("no convolution")))
    if len(different) <= 1:
        return different[0] if different else precisions[0]
    return "; ".join(f"stage {index}: {each}" for index, each in enumerate(precisions))
