"""A document as Markdown (GitHub's, for its tables); a chart is there as what its alternative text says."""

from __future__ import annotations

import re

from optc.report.document import Chart, Code, Document, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#])")


def markdown(document: Document) -> str:
    """The document as Markdown text."""
    lines = [f"# {_escaped(document.title)}", "", f"**{_escaped(document.verdict)}**", ""]
    lines += [f"- {_escaped(line)}" for line in document.summary]
    for section in document.sections:
        lines += ["", f"## {_escaped(section.title)}"]
        for part in section.parts:
            lines += ["", *_part(part)]
    return "\n".join([*lines, "", _escaped(document.made), ""])


def _part(part: str | Chart | Table | Code) -> list[str]:
    match part:
        case Chart():
            return [f"**{_escaped(part.title)}**", "", _escaped(part.alt)]
        case Table():
            return [f"**{_escaped(part.title)}**", "", *_table(part)]
        case Code():
            return [f"**{_escaped(part.title)}**", "", "```sh", *part.lines, "```"]
        case _:
            return [_escaped(part)]


def _table(table: Table) -> list[str]:
    rule = ["---:" if column in table.numbers else "---" for column in range(len(table.header))]
    rows = [[_escaped(cell) for cell in row] for row in table.rows]
    if table.strong is not None:
        rows[table.strong] = [f"**{cell}**" if cell else cell for cell in rows[table.strong]]
    return [f"| {' | '.join(row)} |" for row in ([_escaped(cell) for cell in table.header], rule, *rows)]


def _escaped(text: str) -> str:
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
