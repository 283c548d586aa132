"""One stage of a pipeline in one process: PyTorch's pipeline stage and schedule around a backend's runner."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from optc.errors import ArtifactError, BackendError, OptcError, first_line
from optc.lowering.artifact import load_artifact
from optc.lowering.backend import Runner
from optc.lowering.manifest import NAME as MANIFEST
from optc.lowering.manifest import sha256
from optc.lowering.pipeline_file import PipelineFile
from optc.stages import Wire
from optc.target import Target

_COLLECTIVE = timedelta(minutes=30)
"""How long a rank waits for another that is alive: as long as it takes to compile or to read a slow disk."""
_KEPT = 4
"""Batch sizes for which buffers are kept."""


@dataclass(frozen=True)
class Place:
    """Which rank this is, of how many, and where the ranks meet."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    own_store: bool

    @classmethod
    def here(cls, stages: int) -> Place:
        """Read what torchrun, or whatever else started the ranks, says in the environment.

        Raises:
            OptcError: it says nothing, or there are not as many ranks as stages.
        """
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        except (KeyError, ValueError):
            raise OptcError(
                "this program is one rank of several and was started alone",
                f"start it with torchrun --nproc-per-node {stages} -m optc.distributed ARTIFACT",
            ) from None
        if world != stages:
            raise OptcError(
                f"the pipeline has {stages} stages, and {world} ranks were started",
                f"start {stages}: torchrun --nproc-per-node {stages} …, or --nnodes N and {stages}/N on each",
            )
        local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, world, *local, address, port, own_store=rank == 0 and not agent)

    def store(self, seconds: float, *, serve: bool = False) -> TCPStore:
        """A connection to the store where the ranks meet.

        Args:
            serve: be the store, if this is the rank to be it.

        Raises:
            OptcError: its port is taken, or nobody answers.
        """
        serving = serve and self.own_store
        try:
            return TCPStore(
                self.address,
                self.port,
                self.world,
                is_master=serving,
                wait_for_workers=False,
                timeout=timedelta(seconds=seconds),
            )
        except (RuntimeError, ValueError) as error:
            where = f"{self.address}:{self.port}"
            if serving:
                raise OptcError(
                    f"rank {self.rank} cannot listen at {where}: the port is in use", "choose another MASTER_PORT"
                ) from error
            why = f"reached nobody at {where} for {seconds:g} s: {first_line(error)}"
            raise OptcError(f"rank {self.rank} {why}") from error


class StageRank:
    """A loaded stage, ready to take its part of queries.

    Attributes:
        runner: the backend's, over this stage's files alone.
        transport: ``"nccl"`` where every rank has a GPU of its own, else ``"gloo"``.
        computing_since: when the microbatch at work began, by :func:`time.monotonic`; ``None`` between two.
    """

    def __init__(self, place: Place, store: Store, folder: Path, description: PipelineFile, target: Target) -> None:
        self._place, self._description = place, description
        entry = description.stages[place.rank]
        self.computing_since: float | None = None
        self.transport = self._meet(store, target)
        self.runner = load_stage(folder, description, place.rank, target)
        self._receives, self._sends = ([each.wire for each in wires] for wires in (entry.receives, entry.sends))
        self._module = _StageModule(self)
        self._schedules: OrderedDict[tuple[int, int], ScheduleGPipe] = OrderedDict()

    @property
    def first(self) -> bool:
        """Whether it takes the model's inputs."""
        return self._place.rank == 0

    @property
    def last(self) -> bool:
        """Whether it gives the model's outputs."""
        return self._place.rank == self._place.world - 1

    @torch.no_grad()
    def run(self, batch: int, microbatches: int, inputs: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
        """Take this stage's part of one query.

        Args:
            batch: images in the query, of which each microbatch has the same share.
            inputs: the model's, for the first stage.

        Returns:
            The model's outputs from the last stage, nothing from the others.
        """
        placed = [tensor.to(self._device, wire.dtype) for tensor, wire in zip(inputs, self._receives, strict=False)]
        try:
            outputs = self._schedule(microbatches, batch // microbatches).eval(*placed)
        except RuntimeError as error:
            if "failed to run forward" in str(error) and error.__cause__ is not None:
                raise error.__cause__ from None  # PyTorch's own words do not say what went wrong
            raise
        return tuple(outputs) if self.last else ()

    def wires(self) -> list[Wire]:
        """The model's inputs, of the first stage."""
        return list(self._receives)

    def compute(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run one microbatch."""
        self.computing_since = time.monotonic()
        outputs = self.runner.run_tensors(*inputs)
        self.computing_since = None
        return tuple(
            output.to(self._device, wire.dtype).contiguous() for output, wire in zip(outputs, self._sends, strict=True)
        )

    def _meet(self, store: Store, target: Target) -> str:
        """Join the others, over NCCL if every rank has a GPU for itself."""
        place, self._device = self._place, torch.device("cpu")
        gpus = torch.cuda.device_count() if target.device == "cuda" else 0
        if target.device == "cuda" and not gpus:
            raise BackendError("the stages were lowered for cuda, and this PyTorch sees no GPU here")
        if gpus:
            torch.cuda.set_device(place.local_rank % gpus)
        store.set(f"optc/own-gpu/{place.rank}", "1" if gpus >= place.local_world else "0")
        own = all(store.get(f"optc/own-gpu/{rank}") == b"1" for rank in range(place.world))
        transport = "nccl" if own else "gloo"
        if own:
            self._device = torch.device("cuda", place.local_rank)
        dist.init_process_group(
            transport,
            store=PrefixStore("optc/group", store),
            rank=place.rank,
            world_size=place.world,
            timeout=_COLLECTIVE,
            device_id=self._device if own else None,
        )
        return transport

    def _schedule(self, microbatches: int, rows: int) -> ScheduleGPipe:
        key = microbatches, rows
        if key in self._schedules:
            self._schedules.move_to_end(key)
        else:
            self._schedules[key] = self._new_schedule(microbatches, rows)
            if len(self._schedules) > _KEPT:
                self._schedules.popitem(last=False)
        return self._schedules[key]

    def _new_schedule(self, microbatches: int, rows: int) -> ScheduleGPipe:
        """A schedule with buffers for one batch size. Shapes are told beforehand: PyTorch would send them pickled."""
        stage = PipelineStage(
            self._module,
            self._place.rank,
            self._place.world,
            self._device,
            input_args=tuple(_like(wire, rows) for wire in self._receives),
            output_args=tuple(_like(wire, rows) for wire in self._sends),
        )
        return ScheduleGPipe(stage, microbatches)


class _StageModule(nn.Module):
    """What PyTorch's pipeline stage calls for each microbatch."""

    def __init__(self, rank: StageRank) -> None:
        super().__init__()
        self._run = rank.compute

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._run(inputs)


def load_stage(folder: Path, description: PipelineFile, rank: int, target: Target) -> Runner:
    """Load one stage's files; no other stage's are opened.

    Raises:
        ArtifactError: they are missing, or altered.
    """
    entry = description.stages[rank]
    artifact = load_artifact(folder / entry.folder)
    if sha256(artifact.folder / MANIFEST) != entry.manifest_sha256:
        raise ArtifactError(
            f"{artifact.folder / MANIFEST} was altered: its SHA-256 is not the pipeline's", "make the artifact again"
        )
    return artifact.runner(target)


def _like(wire: Wire, rows: int) -> Tensor:
    return torch.empty(wire.sizes(rows), dtype=wire.dtype, device="meta")
