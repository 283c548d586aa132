"""Measuring as on a smaller machine: fewer CPUs, less memory. What is in force is said beside the results."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from optc.errors import MeasurementError

_MOST_BYTES = 2**60
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_bytes(text: str) -> int:
    """``"512MB"``, ``"2GiB"`` or ``"2G"`` as a number of bytes.

    Raises:
        MeasurementError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    size = float(match[1]) * _UNITS[match[2] or ""] if match else 0.0
    if not 1 <= size <= _MOST_BYTES:
        raise MeasurementError(f"'{text}' is no size of memory", "write 512MB or 2GiB")
    return int(size)


def parse_cpus(text: str) -> frozenset[int]:
    """``"0-3,8"`` as CPU numbers.

    Raises:
        MeasurementError: it is no list of CPUs, or names one this process may not use.
    """
    allowed = os.sched_getaffinity(0)
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})(?:\s*-\s*(\d{1,18}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise MeasurementError(f"'{text}' is no list of CPUs", "write 0,2 or 0-3")
        for cpu in range(int(match[1]), int(match[2] or match[1]) + 1):
            if cpu not in allowed:
                raise MeasurementError(
                    f"this process may not use CPU {cpu}", f"choose among {', '.join(map(str, sorted(allowed)))}"
                )
            found.add(cpu)
    return frozenset(found)


@contextmanager
def limited(cpus: frozenset[int] | None = None, memory_bytes: int | None = None) -> Iterator[None]:
    """Bind every thread of this process to ``cpus`` and let it allocate no more than ``memory_bytes``, for a while.

    Memory is limited as Linux limits a process's data (``RLIMIT_DATA``): what it allocates for itself, not files mapped
    read-only. What is beyond it fails as on a machine without more memory.

    Raises:
        MeasurementError: this process has taken more memory than that already, or the system has no such limits.
    """
    with _affinity(cpus), _memory(memory_bytes):
        yield


def in_force() -> dict[str, Any]:
    """The CPUs this process may use and the limit of its memory, in bytes (``None``: no limit). JSON-ready."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    return {
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_limit_bytes": None if soft == resource.RLIM_INFINITY else soft,
    }


@contextmanager
def _affinity(cpus: frozenset[int] | None) -> Iterator[None]:
    if cpus is None:
        yield
        return
    before = os.sched_getaffinity(0)
    _bind(cpus)
    try:
        yield
    finally:
        _bind(before)


def _bind(cpus: frozenset[int] | set[int]) -> None:
    """Bind threads that are there already, too; new ones inherit it."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cpus)


@contextmanager
def _memory(limit: int | None) -> Iterator[None]:
    if limit is None:
        yield
        return
    import resource

    taken = _data_bytes()
    if taken >= limit:
        raise MeasurementError(
            f"optc itself has taken {taken / 1e6:.0f} MB before any model is loaded, more than --memory-limit",
            f"allow at least {2 * taken / 1e6:.0f} MB",
        )
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _data_bytes() -> int:
    """What Linux counts towards ``RLIMIT_DATA`` so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0
