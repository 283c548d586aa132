"""What a report says, before it is HTML or Markdown: sections of text, charts, tables and commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """A picture that can also be read.

    Attributes:
        title: what it shows, units included.
        alt: what is to be seen in it, in a sentence, for those who cannot see it.
        svg: an ``<svg>`` element for the middle of an HTML page; see :mod:`optc.report.svg`.
        note: how to read it; may be empty.
    """

    title: str
    alt: str
    svg: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        header: column titles, units included.
        rows: as many cells each.
        numbers: columns, counted from 0, that hold numbers.
        strong: the row to stress, counted from 0.
        folded: whether it is long and of interest to few, and may be shown folded.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: Sequence[int] = ()
    strong: int | None = None
    folded: bool = False


@dataclass(frozen=True)
class Code:
    """Commands to copy."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it, in the order given."""

    title: str
    parts: tuple[str | Chart | Table | Code, ...]


@dataclass(frozen=True)
class Document:
    """A whole report: the summary first, in plain words.

    Attributes:
        verdict: one line; ``good`` says whether it is good news, ``None`` that it is neither.
        made: what made the report and when, for the foot of the page.
    """

    title: str
    verdict: str
    good: bool | None
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    made: str = ""
