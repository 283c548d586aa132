"""What every benchmark shares: a claim, a table, raw samples, and how they are written down."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optc.machine import load_warning, machine

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
    """

    claim: str
    held: bool
    finding: str
    table: Sequence[Mapping[str, str | int | float]]
    raw: Any
    notes: Sequence[str] = ()


def publish(name: str, benchmark: Callable[[], Result]) -> None:
    """Run a benchmark, write ``results/NAME.json`` and ``.md``, and exit with 1 if its claim did not hold."""
    busy = load_warning()
    start = time.perf_counter()
    result = benchmark()
    if busy:
        result = Result(**{**vars(result), "notes": (*result.notes, busy)})
    facts = machine(gpus=False)
    RESULTS.mkdir(exist_ok=True)
    document = {"benchmark": name, "seconds": time.perf_counter() - start, "machine": asdict(facts), **asdict(result)}
    _write(RESULTS / f"{name}.json", json.dumps(document))
    text = _markdown(name, result, f"{facts.cpu}, {facts.cores} cores, {', '.join(facts.isa or ())}")
    _write(RESULTS / f"{name}.md", text)
    print(text)
    sys.exit(0 if result.held else 1)


def say(text: str) -> None:
    """Progress, apart from the result."""
    print(f"  {text}", file=sys.stderr, flush=True)


def _markdown(name: str, result: Result, where: str) -> str:
    columns = list(result.table[0])
    rows = [[_cell(row[column]) for column in columns] for row in result.table]
    lines = [
        f"## {name}: {'held' if result.held else 'DID NOT HOLD'}",
        "",
        f"{result.claim}",
        "",
        f"**{result.finding}** ({where})",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
        *[f"| {' | '.join(row)} |" for row in rows],
        "",
        *[f"- {note}" for note in result.notes],
    ]
    return "\n".join(lines).rstrip() + "\n"


def _cell(value: str | float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
