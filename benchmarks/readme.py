"""The numbers in README.md: one row per benchmark, from the committed results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from string import ascii_uppercase
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- numbers: begin (written by benchmarks/readme.py from benchmarks/results; do not edit by hand) -->"
END = "<!-- numbers: end -->"


def block() -> str:
    """The table of all results, with the command that makes each."""
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    machines = list(dict.fromkeys(_machine(result) for result in results if not result.get("measured_on")))
    lines = ["| claim | held | found | on | commit | command |", "|---|---|---|---|---|---|"]
    for result in results:
        held = "yes" if result["held"] else "**no**"
        command = result.get("command", f"python benchmarks/{result['benchmark']}.py")
        on = result.get("measured_on") or ascii_uppercase[machines.index(_machine(result))]
        commit = result.get("commit") or "an earlier one"
        lines.append(f"| {result['claim']} | {held} | {result['finding']} | {on} | {commit} | `{command}` |")
    where = "; ".join(f"{letter}: {name}" for letter, name in zip(ascii_uppercase, machines, strict=False))
    return "\n".join(
        [*lines, "", f"Measured on {where}. Tables and raw samples are in [benchmarks/results](benchmarks/results)."]
    )


def _machine(result: dict[str, Any]) -> str:
    of = result["machine"]
    return f"{of['cpu']}, {of['cores']} cores ({', '.join(of['isa'] or ('unknown instructions',))})"


def filled(text: str) -> str:
    """README's text with the block of numbers renewed."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{block()}\n{END}{after}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    temporary = readme.with_suffix(".tmp")
    temporary.write_text(filled(readme.read_text()))
    os.replace(temporary, readme)
