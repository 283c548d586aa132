"""optc, through its public API: several lists of passes on every backend, the fastest kept."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch

import optc
from optc import Runner, Target
from optc.lowering.artifact import load_artifact
from tools.peer import Peer, Task

ARTIFACT = "artifact"


class Optc(Peer):
    """One or several lists of passes; optc measures them on the backends and keeps the fastest."""

    def __init__(self, passes: str) -> None:
        self.passes = passes

    def produce(self, task: Task, folder: Path) -> dict[str, Any]:
        """Capture, run and verify the passes, lower to every backend, measure them, keep and save one."""
        loaded, example = task.loaded, torch.from_numpy(task.queries[0][0])
        with contextlib.chdir(folder):  # where reproducers of lists that fail verification go
            optimized = optc.optimize(
                loaded.module,
                example,
                self.passes,
                backend="auto",
                calibration=task.calibration,
                measure=False,
                target=_target(task),
                info=loaded.info,
            )
        start = time.perf_counter()
        optimized.save(folder / ARTIFACT)
        report = optimized.report
        saving = {"Saving": time.perf_counter() - start}
        outcomes = [vars(outcome) for outcome in report.backends]
        return {
            "passes": self.passes,
            "kept": report.backends[0].title,
            "steps": {**report.seconds, **saving},
            "backends": outcomes,
        }

    def load(self, task: Task, folder: Path) -> Runner:
        """Load the artifact."""
        return load_artifact(folder / ARTIFACT).runner(_target(task))


def _target(task: Task) -> Target:
    return Target(threads=task.threads, batch=task.batch)
