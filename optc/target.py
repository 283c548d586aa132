"""What the optimized model is made for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_threads() -> int:
    """Number of CPU threads this process may use: its affinity mask's, not the machine's, within a container's quota.

    A quota (``docker run --cpus``, a Kubernetes limit) hides no core. As many threads as the machine has cores would
    use it up in a part of each period and then wait for the next one.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota() -> float | None:
    """CPU seconds per second that the container may take; ``None`` without a limit.

    Source: ``cpu.max`` in https://docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    try:
        limit, period = _QUOTA.read_text().split()
        return int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None


@dataclass(frozen=True)
class Target:
    """The device and limits a program is lowered for.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        threads: intra-op threads every candidate runs with.
        batch: images per query at measurement time.
        allow_fallback: whether a runtime may run nodes elsewhere than asked for. It lists them either way: as what fell
            back if this is true, as an error if not.
        options: by name of a backend, its options that are not at their defaults.
    """

    device: str = "cpu"
    threads: int = field(default_factory=available_threads)
    batch: int = 1
    allow_fallback: bool = False
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def with_options(self, backend: str, options: Mapping[str, Any]) -> Target:
        """This target with further options of a backend."""
        return replace(self, options={**self.options, backend: {**self.options.get(backend, {}), **options}})
