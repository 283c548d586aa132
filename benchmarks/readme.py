"""The numbers in README.md: one row per benchmark, from the committed results."""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- numbers: begin (written from `make bench`; do not edit by hand) -->"
END = "<!-- numbers: end -->"


def block() -> str:
    """The table of all results, with the command that makes each."""
    lines = ["| claim | held | found | command |", "|---|---|---|---|"]
    machines = set()
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        machines.add(f"{result['machine']['cpu']}, {result['machine']['cores']} cores")
        held = "yes" if result["held"] else "**no**"
        command = result.get("command", f"python benchmarks/{result['benchmark']}.py")
        lines.append(f"| {result['claim']} | {held} | {result['finding']} | `{command}` |")
    where = "; ".join(sorted(machines))
    return "\n".join(
        [*lines, "", f"Measured on {where}; tables and raw samples are in [benchmarks/results](benchmarks/results)."]
    )


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
