"""PyTorch: eager, and ``torch.compile`` with freezing (weights are constants, packed for the kernels)."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from optc import Runner
from optc.lowering.backend import Array
from tools.peer import CallRunner, Peer, Task, require_bfloat16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHE = "inductor"


class Torch(Peer):
    """PyTorch in one type throughout."""

    def __init__(self, kind: str) -> None:
        self.dtype = DTYPES[kind]

    def prepare(self) -> None:
        """Refuse a type that the CPU has to emulate."""
        if self.dtype == torch.bfloat16:
            require_bfloat16()


class Eager(Torch):
    """The module as it is, or converted as a whole; nothing is made beforehand."""

    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Build and convert the model, which is all that eager mode needs."""
        converted(task.loaded.module, self.dtype)
        return {}

    def load(self, task: Task, folder: Path) -> Runner:
        """The module itself."""
        return torch_runner(converted(task.loaded.module, self.dtype), "torch eager", self.dtype)


class Compiled(Torch):
    """Inductor. It keeps no file: what is timed is compiling with an empty cache, which loading then finds filled."""

    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Compile for the batch."""
        self.load(task, folder)
        return {}

    def load(self, task: Task, folder: Path) -> Runner:
        """Compile and run once."""
        return compiled(converted(task.loaded.module, self.dtype), task, folder, self.dtype)


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself in float32, else a copy."""
    return module if dtype == torch.float32 else copy.deepcopy(module).to(dtype)


def compiled(module: nn.Module, task: Task, folder: Path, dtype: torch.dtype, autocast: bool = False) -> Runner:
    """``torch.compile`` of a module, compiled for the task's queries with the cache in ``folder``."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / CACHE)
    try:
        # Not by torch.compile's options: Dynamo reads this too, and passes weights as inputs if it is off.
        with inductor.patch(freezing=True):
            runner = torch_runner(torch.compile(module, dynamic=False), "torch.compile inductor", dtype, autocast)
            runner(*task.queries[0])
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before
    return runner


def torch_runner(module: Callable[..., Any], provider: str, dtype: torch.dtype, autocast: bool = False) -> Runner:
    """Arrays in and out in float32; converting them to ``dtype`` and back is part of a query."""

    @torch.no_grad()
    def call(*inputs: Array) -> tuple[Array, ...]:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            output: Tensor = module(*(torch.from_numpy(array).to(dtype) for array in inputs))
        return (output.float().numpy(),)

    return CallRunner(call, provider, str(dtype).removeprefix("torch."))
