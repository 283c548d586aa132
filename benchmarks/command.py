"""Running ``optc optimize`` as a user does, watching the memory of its whole process tree."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SAMPLE_SECONDS = 0.05
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Command:
    """What a command did.

    Attributes:
        report: its JSON output.
        seconds: wall time, from start to exit.
        peak_bytes: largest sum of the resident sets (shared and file-backed pages counted in each) of the tree.
        resident: (seconds, bytes) samples.
    """

    report: dict[str, Any]
    seconds: float
    peak_bytes: int
    resident: list[tuple[float, int]]


@dataclass(frozen=True)
class Watched:
    """How a process went: wall time, (seconds, resident bytes) samples of its tree, and how it ended."""

    seconds: float
    resident: list[tuple[float, int]]
    returncode: int
    timed_out: bool = False

    @property
    def peak_bytes(self) -> int:
        """Largest sum of the resident sets (shared and file-backed pages counted in each) of the tree."""
        return max((resident for _, resident in self.resident), default=0)

    def failure(self, log: Path) -> str:
        """Why it ended as it did, with the last line of what it said."""
        if self.timed_out:
            return f"stopped after {self.seconds:.0f} s"
        how = "killed, perhaps for memory" if self.returncode == -signal.SIGKILL else f"exit status {self.returncode}"
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return ": ".join([how, *said[-1:]])


def watch(
    command: list[str],
    *,
    cwd: Path,
    output: Path,
    errors: int | None = None,
    environment: Mapping[str, str] | None = None,
    limit_seconds: float = float("inf"),
) -> Watched:
    """Run a command to its end, or to the limit, its output in a file and its errors as ``subprocess`` is told. Linux.

    An interrupted or endless command leaves nothing running.
    """
    start = time.perf_counter()
    samples: list[tuple[float, int]] = []
    seconds = 0.0
    with output.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=errors, cwd=cwd, env=environment, start_new_session=True)
        try:
            while process.poll() is None and seconds <= limit_seconds:
                samples.append((seconds, tree_resident(process.pid)))
                time.sleep(_SAMPLE_SECONDS)
                seconds = time.perf_counter() - start
            timed_out = process.poll() is None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Watched(seconds, samples, process.returncode, timed_out)


def optimize(arguments: list[str], folder: Path) -> Command:
    """Run ``optc optimize ARGUMENTS --json`` and wait; its progress goes to the terminal. Linux only."""
    command = [str(Path(sys.executable).with_name("optc")), "optimize", *arguments, "--json"]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / "report.json"
        watched = watch(command, cwd=folder, output=output)
        if watched.returncode:
            sys.exit(f"{' '.join(command)} exited with {watched.returncode}")
        report = json.loads(output.read_bytes())
    return Command(report, watched.seconds, watched.peak_bytes, watched.resident)


def tree_resident(root: int) -> int:
    """Resident bytes of a process and everything it started, now."""
    children, resident = defaultdict(list), {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            resident[int(entry.name)] = int((entry / "statm").read_text().split()[1]) * _PAGE
        except OSError:  # it ended meanwhile
            continue
        children[int(fields[1])].append(int(entry.name))
    total, pending = 0, [root]
    while pending:
        process = pending.pop()
        total += resident.get(process, 0)
        pending += children[process]
    return total
