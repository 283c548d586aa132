"""A comparison on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from optc.bench.compare import Comparison, Contender
from optc.bench.paired import CONFIDENCE
from optc.report.words import latency_cells


def comparison_table(contenders: Sequence[Contender], comparisons: Sequence[Comparison]) -> Table:
    """One row per target: latency, and its ratio to the first one's with a confidence interval.

    A number whose measurement has warnings is marked with an exclamation mark.
    """
    table = Table(
        "target", "precision", "p50 ms", "p90 ms", "p99 ms", "times the first", f"{CONFIDENCE:.0%} interval",
        box=None, pad_edge=False, header_style="bold",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    ratios = [None, *(comparison.ratio for comparison in comparisons)]
    for each, ratio in zip(contenders, ratios, strict=True):
        result, p = each.result, each.result.percentiles
        cells = list(latency_cells(p)) if p else ["", "", ""]
        if each.warnings:
            cells[0] = f"! {cells[0]}"
        candidate = result.name.removeprefix(each.target).strip()
        table.add_row(
            Text(f"{each.target} ({candidate})" if candidate else each.target),
            result.precision,
            *cells,
            f"{ratio.value:.3f}" if ratio else "1",
            f"{ratio.low:.3f} – {ratio.high:.3f}" if ratio else "",
        )
    return table
