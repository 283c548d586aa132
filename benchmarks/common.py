"""What every benchmark shares: a claim, a table, raw samples, and how they are written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optc.bench.disturbance import busy_warning
from optc.machine import machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Result:
    """What a benchmark found.

    Attributes:
        claim: the statement that was put to the test, with its limit.
        held: whether it held.
        finding: the figure that decided, in one line.
        table: rows of equal keys, for people.
        raw: every sample, for machines.
        notes: what to know before believing the numbers.
        measured_on: where, if not on this machine alone.
    """

    claim: str
    held: bool
    finding: str
    table: Sequence[Mapping[str, str | int | float]]
    raw: Any
    notes: Sequence[str] = ()
    measured_on: str = ""


def publish(
    name: str, benchmark: Callable[[], Result], *, command: str = "", folder: Path = RESULTS, load: bool = True
) -> None:
    """Run a benchmark, write ``NAME.json`` and ``.md`` into ``folder``, and exit with 1 if its claim did not hold.

    Args:
        command: what a reader types to run it; by default the script of that name.
        load: whether to note that the machine was busy before.
    """
    busy = busy_warning() if load else None
    revision = commit()
    start = time.perf_counter()
    result = benchmark()
    if busy:
        result = Result(**{**vars(result), "notes": (*result.notes, busy)})
    facts = machine(gpus=False)
    folder.mkdir(exist_ok=True)
    run = {"benchmark": name, "command": command or f"python benchmarks/{name}.py", "commit": revision}
    document = {**run, "seconds": time.perf_counter() - start, "machine": asdict(facts), **asdict(result)}
    write(folder / f"{name}.json", json.dumps(document))
    where = result.measured_on or f"{facts.cpu}, {facts.cores} cores, {', '.join(facts.isa or ())}"
    text = _markdown(name, result, f"{where}; commit {revision}")
    write(folder / f"{name}.md", text)
    print(text)
    sys.exit(0 if result.held else 1)


def commit() -> str:
    """What is measured: the commit that is checked out, or nothing known; with what differs besides results, dirty."""
    differs = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results", ":(top,exclude)README.md")
    found = _git("describe", "--always", "--exclude=*")
    return f"{found}-dirty" if found and differs else found


def _git(*arguments: str) -> str:
    asked = ["git", *arguments]
    done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(f"  {text}", file=sys.stderr, flush=True)


def markdown_table(table: Sequence[Mapping[str, str | int | float]]) -> list[str]:
    """Rows of equal keys as lines of Markdown."""
    columns = list(table[0])
    rows = [[_cell(row[column]) for column in columns] for row in table]
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *[f"| {' | '.join(row)} |" for row in rows]]


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _markdown(name: str, result: Result, where: str) -> str:
    lines = [
        f"## {name}: {'held' if result.held else 'DID NOT HOLD'}",
        "",
        f"{result.claim}",
        "",
        f"**{result.finding}** ({where})",
        "",
        *markdown_table(result.table),
        "",
        *[f"- {note}" for note in result.notes],
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cell(value: str | float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
