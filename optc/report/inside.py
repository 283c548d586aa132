"""Time by layer and memory, as sections of a report."""

from __future__ import annotations

from optc.bench.inside import Inside
from optc.bench.memory import Memory
from optc.report.charts import steps_chart
from optc.report.document import Chart, Section, Table
from optc.report.where import is_beyond, where_section
from optc.report.words import megabytes, milliseconds

_WANTED = {"compute": "arithmetic units", "memory": "memory bandwidth"}


def inside_sections(inside: Inside, name: str = "") -> tuple[Section, ...]:
    """Where the time goes and what memory it takes, with the reasons for what is missing.

    Args:
        name: of what was looked into, where a report has several.
    """
    of = f": {name}" if name else ""
    where = where_section(inside.layers_after, inside.layers_before)
    told = tuple(f"Missing: {reason}" for reason in inside.missing)
    return (
        Section(f"{where.title}{of}", (*where.parts, *told)),
        Section(f"Memory{of}", _memory(inside.memory)),
    )


def inside_in_words(inside: Inside) -> list[str]:
    """What is inside in a line each: how far the time is from what the machine could do, and the memory it takes."""
    lines = []
    after = inside.layers_after
    if after is not None and after.operations and after.seconds:
        took = f"Its operators take {milliseconds(after.seconds)}"
        if is_beyond(after) or after.peaks.disturbed:
            lines.append(f"{took}; what this machine can do at most was measured too low to say how far off that is.")
        else:
            lines.append(
                f"{took}; this machine could not do their work in less than {milliseconds(after.floor_seconds)},"
                f" for want of {_WANTED[after.bound]}."
            )
    if len(inside.memory) > 1:
        first, last = inside.memory[0], inside.memory[-1]
        lines.append(
            f"A process that only answers queries takes {megabytes(last.query_peak)} of memory, in eager PyTorch"
            f" {megabytes(first.query_peak)}."
        )
    return lines


def _memory(found: tuple[Memory, ...]) -> tuple[str | Chart | Table, ...]:
    if not found:
        return ()
    last = found[-1]
    words = [
        (
            f"A process that does nothing but answer queries with {last.what} takes {megabytes(last.query_peak)} at "
            f"most, {megabytes(last.runtime)} of them for the runtime's own libraries; while it loads the model, "
            f"{megabytes(last.load_peak)}."
        )
    ]
    if len(found) > 1:
        first = found[0]
        words.append(
            f"Before, in eager PyTorch, it was {megabytes(first.query_peak)}, {megabytes(first.runtime)} for libraries."
        )
    header = ("what", "libraries (MB)", "most while loading (MB)", "loaded (MB)", "most while answering (MB)")
    rows = tuple(
        (
            each.what,
            *(_mb(size) for size in (each.runtime, each.load_peak, each.loaded, each.query_peak)),
            "none" if each.device is None else _mb(each.device),
            _mb(each.files),
        )
        for each in found
    )
    table = Table("Memory of a process of its own", (*header, "GPU (MB)", "files (MB)"), rows, range(1, 7))
    chart = steps_chart(
        "Most memory while answering", "MB", [each.what for each in found], [each.query_peak / 1e6 for each in found]
    )
    return (*words, chart, table)


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"
