"""What ``optc profile`` found, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from optc.bench.results import CandidateResult, Measurement
from optc.bench.scenario_result import ScenarioResult
from optc.bench.statistics import Ratio
from optc.bench.verdict import of_blocks
from optc.report.words import latency_cells


def latency_table(
    measurement: Measurement,
    parameters: Mapping[str, int | None],
    accuracies: Mapping[str, float | None],
    reference: tuple[str, CandidateResult, int | None] | None,
    ratio: Callable[[CandidateResult], Ratio] | None,
) -> Table:
    """One row per candidate in SingleStream, and one for the reference.

    Args:
        parameters, accuracies: by candidate; ``None`` where unknown.
        reference: its name, how it was measured, its parameters.
        ratio: of a candidate's latency to the reference's.
    """
    table = Table("SingleStream", "precision", "p50 ms", "p90 ms", "p99 ms", "LoadGen", "params", "top-1", box=None,
                  pad_edge=False, header_style="bold")  # fmt: skip
    table.columns[0].overflow, table.columns[0].min_width = "fold", len("SingleStream")
    if reference is not None:
        table.add_column("ratio")
    for column in (*table.columns[2:5], *table.columns[6:]):
        column.justify, column.no_wrap = "right", True
    for result in measurement.results:
        compared = f"{ratio(result).value:.3g}" if ratio and result.percentiles else ""
        row = _row(result, parameters[result.name], accuracies[result.name])
        table.add_row(*row, *([compared] if reference else []))
    if reference is not None:
        _, result, count = reference
        table.add_row(*_row(result, count, None), "1", style="dim")
    return table


def scenario_table(results: Sequence[ScenarioResult]) -> Table:
    """One row per candidate and scenario."""
    table = Table("scenario", "candidate", "result", "", "batch", "LoadGen", box=None, pad_edge=False,
                  header_style="bold")  # fmt: skip
    table.columns[2].justify = table.columns[4].justify = "right"
    for result in results:
        value = "–" if result.value is None else f"{result.value:.4g}"
        table.add_row(
            result.scenario, Text(result.name), value, result.metric, str(result.batch), _verdict(result.valid)
        )
    return table


def problems(measurement: Measurement, scenarios: Sequence[ScenarioResult]) -> list[str]:
    """What is INVALID, why and how to mend it, and what else to know before believing the numbers."""
    lines = list(measurement.warnings)
    for result in measurement.results:
        verdict = of_blocks(result)
        if not verdict.valid:
            lines.append(_mended(f"{result.name}: INVALID: {verdict.reason}", verdict.mend))
        lines += [f"{result.name}: {warning}" for warning in result.warnings]
    for each in scenarios:
        if not each.valid:
            why = _mended(f"INVALID: {'; '.join(each.reasons)}", "; ".join(each.mends))
            lines.append(f"{each.name}, {each.scenario}: {why}")
        lines += [f"{each.name}, {each.scenario}: {note}" for note in each.notes]
    if measurement.sequential_reason:
        lines.append(f"candidates were measured one after another, not in turns: {measurement.sequential_reason}")
    return lines


def _row(result: CandidateResult, count: int | None, accuracy: float | None) -> list[str | Text]:
    p = result.percentiles
    latencies = list(latency_cells(p)) if p else ["–", "–", "–"]
    if p and result.warnings:
        latencies[0] = f"! {latencies[0]}"
    return [
        Text(result.name),
        result.precision,
        *latencies,
        _verdict(of_blocks(result).valid),
        f"{count / 1e6:.1f} M" if count else "–",
        f"{accuracy:.2%}" if accuracy is not None else "–",
    ]


def _verdict(valid: bool) -> Text:
    return Text("VALID", "green") if valid else Text("INVALID", "bold red")


def _mended(text: str, mend: str) -> str:
    return f"{text} — {mend}" if mend else text
