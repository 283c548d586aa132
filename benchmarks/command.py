"""Running ``optc optimize`` as a user does, watching the memory of its whole process tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
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


def optimize(arguments: list[str], folder: Path) -> Command:
    """Run ``optc optimize ARGUMENTS --json`` and wait; its progress goes to the terminal. Linux only."""
    command = [str(Path(sys.executable).with_name("optc")), "optimize", *arguments, "--json"]
    start = time.perf_counter()
    samples: list[tuple[float, int]] = []
    with tempfile.TemporaryFile(dir=folder) as output:
        process = subprocess.Popen(command, stdout=output, cwd=folder)
        try:
            while process.poll() is None:
                samples.append((time.perf_counter() - start, tree_resident(process.pid)))
                time.sleep(_SAMPLE_SECONDS)
        finally:
            process.terminate()  # an interrupted benchmark leaves no command running; no effect on one that ended
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"{' '.join(command)} exited with {process.returncode}")
        output.seek(0)
        report = json.loads(output.read())
    return Command(report, seconds, max(resident for _, resident in samples), samples)


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
