"""``pipeline.json``: the stages of a pipeline artifact, what they hand on, and how a batch goes through them."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from optc.errors import ArtifactError
from optc.lowering.manifest import NAME as MANIFEST
from optc.lowering.manifest import read_manifest
from optc.stages import Wire

PIPELINE = "pipeline.json"
VERSION = 1


class WireEntry(BaseModel):
    """A tensor on its way between stages: its name, shape (``None`` for the batch) and dtype as PyTorch spells it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    shape: tuple[int | None, ...]
    dtype: Literal[
        "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
        "float8_e4m3fn", "float8_e5m2",
    ]  # fmt: skip

    @classmethod
    def of(cls, wire: Wire) -> WireEntry:
        """The entry of a wire."""
        return cls(name=wire.name, shape=wire.shape, dtype=str(wire.dtype).removeprefix("torch."))  # type: ignore[arg-type]

    @property
    def wire(self) -> Wire:
        """The wire of an entry."""
        return Wire(self.name, self.shape, getattr(torch, self.dtype))


class StageEntry(BaseModel):
    """A stage.

    Attributes:
        folder: an artifact of its own.
        manifest_sha256: hash of that artifact's manifest.
        threads: of a CPU, that it was planned for.
        weight_bytes: of its constants.
        predicted: the partitioner's account of it; empty where it was cut otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    folder: str = Field(pattern=r"^stage-\d+$")
    manifest_sha256: str = Field(pattern="^[0-9a-f]{64}$")
    threads: int = Field(ge=1)
    weight_bytes: int = Field(ge=0)
    receives: tuple[WireEntry, ...]
    sends: tuple[WireEntry, ...]
    predicted: dict[str, Any] = {}


class PipelineFile(BaseModel):
    """The contents of ``pipeline.json``.

    Attributes:
        backend: what the stages are lowered by.
        device: what they are lowered for.
        schedule: of :mod:`torch.distributed.pipelining`.
        microbatches: parts that a batch goes through the stages in, at most.
        rows: images in a microbatch where that is fixed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["optc pipeline"] = "optc pipeline"
    version: int = VERSION
    backend: str
    device: str
    schedule: Literal["GPipe"] = "GPipe"
    microbatches: int = Field(ge=1)
    rows: int | None = Field(None, ge=1)
    stages: tuple[StageEntry, ...] = Field(min_length=1)

    @property
    def threads(self) -> int:
        """Threads of all stages."""
        return sum(stage.threads for stage in self.stages)

    @property
    def batch(self) -> int:
        """Images in a batch as planned."""
        return self.microbatches * (self.rows or int(self.stages[0].predicted.get("microbatch", 1)))

    def parts(self, batch: int) -> int:
        """Microbatches that a batch goes through in: at most as many as planned, all of one size.

        Raises:
            ArtifactError: the microbatch is fixed and does not divide the batch.
        """
        if self.rows is None:
            return max(parts for parts in range(1, self.microbatches + 1) if batch % parts == 0)
        if batch < 1 or batch % self.rows:
            raise ArtifactError(
                f"the stages take {self.rows} images at a time, which do not divide a batch of {batch}",
                f"give a multiple of {self.rows}",
            )
        return math.ceil(batch / self.rows)


def write_pipeline(folder: Path, description: PipelineFile) -> str:
    """Write ``pipeline.json`` and return its name."""
    (folder / PIPELINE).write_text(description.model_dump_json(indent=1), encoding="utf-8")
    return PIPELINE


def read_pipeline(folder: Path) -> PipelineFile:
    """Read ``pipeline.json``; where the folder is a whole artifact, its hash is compared with the manifest's.

    Raises:
        ArtifactError: it is missing, altered, not valid, or written by a newer optc.
    """
    path = folder / PIPELINE
    try:
        content = path.read_bytes()
    except OSError:
        raise ArtifactError(
            f"'{folder}' is no pipeline: it has no {PIPELINE}", "give a folder that 'optc partition' wrote"
        ) from None
    if (folder / MANIFEST).exists():
        entry = read_manifest(folder).files.get(PIPELINE)
        if entry is None or entry.sha256 != hashlib.sha256(content).hexdigest():
            raise ArtifactError(f"{path} was altered: its SHA-256 is not the manifest's", "make the artifact again")
    try:
        description = PipelineFile.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"{path} is not valid: {where}: {first['msg']}", "make the artifact again") from None
    if description.version > VERSION:
        raise ArtifactError(f"{path} was written by a newer optc", "upgrade optc")
    return description
