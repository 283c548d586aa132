"""The report on a terminal: what each pass did, what was not done and why, and the table before and after."""

from __future__ import annotations

import shlex
from collections import defaultdict
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from optc.bench.choice import rows
from optc.bench.results import CandidateResult
from optc.passmanager.contract import PassRecord, Skip
from optc.report.deviations import deviations
from optc.report.measured import warnings
from optc.report.report import Report
from optc.report.words import distance, latency_cells, megabytes, named, what

REASONS_SHOWN = 6
REFERENCE = "eager-fp32"
"""The candidate whose accuracy and size are the captured model's own."""


def render(report: Report, artifact: Path, verbose: bool = False) -> Group:
    """The whole report of the run that wrote ``artifact``.

    ``verbose`` lists every skipped rewrite instead of the first few of each pass.
    """
    parts: list[object] = [passes_table(report.passes)]
    skipped = skipped_table(report.passes, verbose)
    if skipped.row_count:
        parts += ["", skipped]
    if report.backends:
        parts += ["", backends_table(report)]
    deviating = deviations_table(report, verbose)
    if deviating.row_count:
        parts += ["", deviating]
    parts += [
        "",
        results_table(report),
        "",
        *(Text(f"! {note}", style="yellow") for note in (*report.notes, *warnings(report.measurement))),
    ]
    style = "bold green" if report.faster else "bold yellow"
    script = artifact / "run.py"
    command = shlex.join(("python", str(script)))
    parts.append(Text(f"Artifact: {artifact}" + (f" ({command} runs it without optc)" if script.exists() else "")))
    parts.append(Text(report.verdict, style=style))
    return Group(*parts)  # type: ignore[arg-type]


def passes_table(records: tuple[PassRecord, ...]) -> Table:
    """One row per pass that did something; the others share the last row."""
    table = Table(
        "pass", "what it did", "operators", "constants", "SQNR", "time", title="Passes", title_justify="left", box=None,
        pad_edge=False, header_style="bold",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    for record in records:
        if record.modified:
            before, after = record.notes["statistics"]["operators"]
            bytes_before, bytes_after = record.notes["statistics"]["constant_bytes"]
            table.add_row(
                record.name,
                what(record),
                f"{before} → {after}" if before != after else str(after),
                f"{megabytes(bytes_before)} → {megabytes(bytes_after)}"
                if abs(bytes_before - bytes_after) > 5e4
                else megabytes(bytes_after),
                distance(record),
                f"{record.notes['timing']['seconds']:.2f} s",
            )
    idle = [record.name for record in records if not record.modified]
    if idle:
        table.add_row(Text("nothing to do", style="dim"), Text(", ".join(idle), style="dim"))
    return table


def skipped_table(records: tuple[PassRecord, ...], verbose: bool) -> Table:
    """Rewrites considered and not made, grouped by pass and reason."""
    table = Table(
        "pass", "not done", "why", title="Left as it was", title_justify="left", box=None, pad_edge=False,
        header_style="bold",
    )  # fmt: skip
    for record in records:
        groups: dict[str, list[Skip]] = defaultdict(list)
        for skip in record.skipped:
            groups[skip.reason].append(skip)
        shown = list(groups.items()) if verbose else list(groups.items())[:REASONS_SHOWN]
        for reason, skips in shown:
            table.add_row(record.name, named([skip.node for skip in skips], verbose), reason)
        rest = sum(len(skips) for _, skips in list(groups.items())[len(shown) :])
        if rest:
            table.add_row(record.name, f"{rest} more", "see manifest.json, or run with -v")
    return table


def deviations_table(report: Report, verbose: bool) -> Table:
    """What the runtime does otherwise than the graph or the target asks: one row for each reason."""
    table = Table(
        "what", "where", "why", title=f"Otherwise than asked ({report.backend})", title_justify="left", box=None,
        pad_edge=False, header_style="bold",
    )  # fmt: skip
    for row in deviations(report.lowering, every=verbose):
        table.add_row(*map(Text, row))
    return table


def backends_table(report: Report) -> Table:
    """One row per backend that was tried: what it measured, and why it was kept or not."""
    table = Table(
        "backend", "precision", "p50 ms", "MB", "s to make", "why", title="Backends", title_justify="left", box=None,
        pad_edge=False, header_style="bold",
    )  # fmt: skip
    for column in table.columns[2:5]:
        column.justify = "right"
    for column in (table.columns[0], table.columns[5]):
        column.overflow = "fold"  # a pip line is there to be copied
    for row in rows(report.backends):
        table.add_row(*row, style="bold" if row[0].endswith("(kept)") else None)
    return table


def results_table(report: Report) -> Table:
    """One row per candidate: latency percentiles, ratio, accuracy and size."""
    title = "Before and after"
    if report.measurement is not None and report.measurement.batch > 1:
        title += f", batch {report.measurement.batch}"
    table = Table(
        "candidate", "precision", "p50 ms", "p90 ms", "p99 ms", report.accuracy.metric, "size",
        title=title, title_justify="left", box=None, pad_edge=False, header_style="bold",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    accuracy = report.accuracy
    if accuracy.reason:
        table.caption, table.caption_justify = f"accuracy {accuracy.reason}", "left"
    before = "–" if accuracy.before is None else f"{accuracy.before:.2%}"
    after = "–" if accuracy.after is None else f"{accuracy.after:.2%}"
    if report.measurement is None:
        table.add_row("before", "", "", "", "", before, megabytes(report.model_bytes))
        table.add_row(f"after ({report.backend})", report.precision, "", "", "", after, megabytes(report.file_bytes))
        return table
    for result in report.measurement.results:
        if result.name == report.measurement.optimized:
            table.add_row(*_latency_cells(result), after, megabytes(report.file_bytes), style="bold")
        elif result.name == REFERENCE:
            table.add_row(*_latency_cells(result), before, megabytes(report.model_bytes))
        else:
            table.add_row(*_latency_cells(result))
    return table


def _latency_cells(result: CandidateResult) -> list[str | Text]:
    if result.percentiles is None:
        return [result.name, Text(f"not measured: {result.error}", style="yellow"), "", "", ""]
    return [result.name, result.precision, *latency_cells(result.percentiles)]
