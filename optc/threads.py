"""How many CPU threads this process may run, and how many it should."""

from __future__ import annotations

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_threads() -> int:
    """What candidates run with unless told otherwise: one thread for each core that this process may use.

    Two hardware threads of a core share its arithmetic units, which dense layers keep busy; PyTorch, ONNX Runtime and
    OpenVINO take one thread a core by default as well.
    """
    cores = {_siblings(cpu) for cpu in _affinity()}
    return min(len(cores), most_threads())


def most_threads() -> int:
    """Threads that can run at the same time: those of the affinity mask, within a container's quota.

    A quota (``docker run --cpus``, a Kubernetes limit) hides no CPU. More threads would use it up in a part of each
    period and then wait for the next.
    """
    cpus, quota = usable_cpus(), cpu_quota()
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def usable_cpus() -> int:
    """Hardware threads in the affinity mask of this process."""
    return len(_affinity())


def cpu_quota() -> float | None:
    """CPU seconds per second that the container may take; ``None`` without a limit.

    Source: ``cpu.max`` in https://docs.kernel.org/admin-guide/cgroup-v2.html.
    """
    try:
        limit, period = _QUOTA.read_text().split()
        return int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return None


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """The hardware threads of the core that this one is of, as Linux lists them; itself where that is not told."""
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)
