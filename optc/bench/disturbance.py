"""What disturbed a measurement while it ran: other processes, a hypervisor, heat, a container's quota."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from optc.machine import load_average
from optc.threads import usable_cpus

OTHERS_SHARE = 0.10
"""Share of this process's CPUs that others may take before the numbers get a warning."""
STOLEN_SHARE = 0.02
_LOADED, _LOOK_SECONDS = 0.25, 0.5
"""The load for each CPU from which on others are looked for, and for how long."""
_OTHERS = "other processes took"
_CPUS = Path("/sys/devices/system/cpu")
_QUOTA = Path("/sys/fs/cgroup/cpu.stat")


def busy_warning() -> str | None:
    """A line to print beside a measurement if other processes are at work as it begins, else ``None``.

    The load average alone does not tell: what this process did in the last minute is in it.
    """
    load = load_average()
    if load is None or load < _LOADED * usable_cpus():  # of the machine, whatever part a container's quota allows
        return None
    with Watch() as watch:
        time.sleep(_LOOK_SECONDS)
    if watch.others <= OTHERS_SHARE:
        return None
    return f"{_OTHERS} {watch.others:.0%} of the CPUs as the measurement began: latencies may be too high"


def by_others(warnings: Iterable[str]) -> str:
    """The first of a measurement's warnings that is of other processes; empty where none is."""
    return next((warning for warning in warnings if warning.startswith(_OTHERS)), "")


class Watch:
    """Adds up what happened on the machine during the ``with`` blocks it is used in."""

    def __init__(self) -> None:
        self._start = _counters()
        self._sums = dict.fromkeys(self._start, 0.0)

    def __enter__(self) -> Watch:
        self._start = _counters()
        return self

    def __exit__(self, *error: object) -> None:
        for name, value in _counters().items():
            self._sums[name] += value - self._start[name]

    @property
    def others(self) -> float:
        """CPU time other processes took of the CPUs this process may use, as a share of all; 0 where nothing tells."""
        return max(0.0, self._sums["busy"] - self._sums["own"]) / self._sums["total"] if self._sums["total"] else 0.0

    @property
    def stolen(self) -> float:
        """The share of them that the hypervisor gave to others."""
        return max(0.0, self._sums["steal"]) / self._sums["total"] if self._sums["total"] else 0.0

    def warnings(self) -> list[str]:
        """What is worth knowing beside a number, in plain words."""
        heat, quota = int(self._sums["heat"]), int(self._sums["quota"])
        found = {
            f"{_OTHERS} {self.others:.0%} of the CPUs meanwhile": self.others > OTHERS_SHARE,
            f"the hypervisor took {self.stolen:.0%} of the CPUs meanwhile": self.stolen > STOLEN_SHARE,
            f"the CPUs were throttled for heat {heat} times meanwhile": heat > 0,
            f"the container ran into its CPU quota {quota} times meanwhile": quota > 0,
        }
        return [warning for warning, worth in found.items() if worth]


def _counters() -> dict[str, float]:
    """Seconds so far: of this process's CPUs in all, busy and stolen, and its own and its children's; and events."""
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else set()
    tick = os.sysconf("SC_CLK_TCK")
    busy = steal = 0.0
    rows = [line.split() for line in _read(Path("/proc/stat")).splitlines()]
    rows = [row for row in rows if row and row[0] in mine]
    for row in rows:
        user, nice, system, _, _, irq, softirq, stolen = (int(value) / tick for value in row[1:9])
        busy += user + nice + system + irq + softirq
        steal += stolen
    times = os.times()
    return {
        "total": time.perf_counter() * len(rows),
        "busy": busy,
        "steal": steal,
        "own": times.user + times.system + times.children_user + times.children_system + _running_children(tick),
        "heat": sum(_count(path) for path in _CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")),
        "quota": next((int(line.split()[1]) for line in _read(_QUOTA).splitlines() if "nr_throttled" in line), 0),
    }


def _running_children(tick: int) -> float:
    """CPU seconds of the child processes that run now, such as a pipeline's ranks; :func:`os.times` has ended ones."""
    pids = " ".join(map(_read, Path("/proc/self/task").glob("*/children"))).split()
    rows = [_read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split() for pid in pids]
    return sum((int(row[11]) + int(row[12])) / tick for row in rows if row)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _count(path: Path) -> int:
    text = _read(path).strip()
    return int(text) if text.isdigit() else 0
