"""What a peer is: something that makes a model ready in a folder, in a process of its own, and runs it from there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from optc import Runner
from optc.data.synthetic import SyntheticDataset
from optc.frontend.load import LoadedModel, load_model
from optc.lowering.backend import Array
from optc.machine import emulates_bf16, isa, saturates_int8

JUDGED_IMAGES = 32


@dataclass(frozen=True)
class Task:
    """The same work for every peer.

    Attributes:
        model: a timm or torchvision name; its weights are random, from seed 0.
        batch: images per query.
        threads: for making and for running.
        images: how many calibration images there are; a multiple of ``batch``.
    """

    model: str
    batch: int
    threads: int
    images: int

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model in eval mode."""
        return load_model(self.model, weights="random")

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Training images, in batches of the query's size: tools that fix the batch can take them too."""
        return self._images("train", self.images)

    @cached_property
    def queries(self) -> list[tuple[Array, ...]]:
        """Test images, in batches; what is measured and compared."""
        return [(batch.numpy(),) for batch in self._images("test", max(4, 2 * self.batch))]

    @cached_property
    def judged(self) -> list[Array]:
        """Test images in batches, as many at each batch size: what outputs are compared on."""
        return [batch.numpy() for batch in self._images("test", JUDGED_IMAGES)]

    def _images(self, split: Any, count: int) -> list[Tensor]:
        images = SyntheticDataset().split(split, self.loaded.info.preprocessing)
        return [batch.contiguous() for batch, _ in images.batches(self.batch, count)]


class Peer(ABC):
    """One way of making a model fast."""

    def prepare(self) -> None:
        """Set up what is needed once on a machine; not timed."""

    @abstractmethod
    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Make the model ready in ``folder``; returns facts worth keeping. Runs in a process that does nothing else."""

    @abstractmethod
    def load(self, task: Task, folder: Path) -> Runner:
        """Open what was made, for the task's batch and threads."""


def require_bfloat16() -> None:
    """Raise where the CPU only emulates bfloat16, which nobody would choose.

    With OpenVINO on a CPU with AVX-512 VNNI alone it took AlexNet 5 times as long as float32, and ViT-B 49 times.

    Raises:
        RuntimeError: it has no such instructions.
    """
    if emulates_bf16(isa()):
        raise RuntimeError("this CPU has no bfloat16 arithmetic and would emulate it")


def int8_saturates() -> bool:
    """Whether int8 kernels add pairs of products in 16 bits here, so that tools advise weights of 7 bits."""
    return saturates_int8(isa())


class CallRunner(Runner):
    """Runs a callable of arrays until it is closed."""

    def __init__(self, call: Callable[..., tuple[Array, ...]], provider: str, precision: str) -> None:
        self.provider, self.precision = provider, precision
        self._call: Callable[..., tuple[Array, ...]] | None = call

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        assert self._call is not None, "the runner is closed"
        return self._call(*inputs)

    def close(self) -> None:
        self._call = None
