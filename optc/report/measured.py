"""The parts of a report that any measurement has, and the report of a measurement alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

import optc
from optc.bench.accuracy import AccuracyResult
from optc.bench.inside import Inside
from optc.bench.reference import Reference
from optc.bench.results import CandidateResult, Measurement
from optc.bench.scenario_result import ScenarioResult
from optc.bench.verdict import of_blocks
from optc.machine import Machine, machine
from optc.report.charts import Latencies, latency_chart
from optc.report.document import Chart, Code, Document, Section, Table
from optc.report.inside import inside_sections
from optc.report.words import latency_cells, megabytes, milliseconds, short, times


def measured_document(
    measurement: Measurement,
    scenarios: Sequence[ScenarioResult],
    insides: Mapping[str, Inside],
    notes: Sequence[str],
    commands: Sequence[str],
    accuracies: Sequence[AccuracyResult] = (),
    reference: Reference | None = None,
) -> Document:
    """What a measurement of several candidates found, for people.

    Args:
        scenarios: what ran besides SingleStream's blocks.
        insides: time by layer and memory, by what they were looked at in.
        notes: lines the user must see.
        commands: lines that measure it again.
        accuracies: of candidates, on labelled images.
        reference: the model that they are held against.
    """
    whole = [each for each in measurement.results if each.percentiles and each.error is None]
    ranked = sorted(whole, key=lambda each: (each.nonfinite_queries > 0, _p50(each)))
    failed = [each for each in measurement.results if each not in whole]
    figures = [_figure(each) for each in scenarios if each.value is not None]
    if ranked:
        verdict = f"{ranked[0].name} has the lowest median latency, {milliseconds(_p50(ranked[0]) / 1e9)}"
        finite = [each for each in ranked if not each.nonfinite_queries]
        if not finite:
            verdict += ", and returns NaN or infinity"
        elif len(finite) < len(ranked):
            verdict += ", of those that return no NaN or infinity"
        verdict += "."
    else:
        verdict = figures.pop(0) if figures else "Nothing could be measured, for the reasons below."
    summary = [
        f"{each.name} takes {milliseconds(_p50(each) / 1e9)}, {times(_p50(each) / _p50(ranked[0]))} as long"
        + (" and returns NaN or infinity." if each.nonfinite_queries else ".")
        for each in ranked[1:]
    ]
    if reference is not None:
        held = f"{reference.name}, measured on {reference.run.created.partition('T')[0]}"
        summary += [f"{each.name} takes {reference.ratio(each).value:.3g} times as long as {held}." for each in ranked]
        summary += [f"The reference, {reference.name}: {warning}." for warning in reference.warnings]
    invalid = ((each, of_blocks(each)) for each in whole)
    summary += [f"{each.name}: INVALID by LoadGen's rules: {told.reason}" for each, told in invalid if not told.valid]
    summary += [each.sentence for each in accuracies]
    summary += [*figures, *(f"{each.name} was not measured to the end: {each.error}" for each in failed), *notes]
    speed: tuple[Chart | Table, ...] = ()
    if measurement.results:
        speed = (*latency_charts(measurement), candidates_table(measurement))
    sections = (
        warnings_section(measurement),
        Section("Speed", speed),
        Section("Scenarios", (_scenario_table(scenarios),) if scenarios else ()),
        *(section for name, inside in insides.items() for section in inside_sections(inside, name)),
        Section("Where it ran", environment(machine(), measurement)),
        Section("Measure it again", (Code("The same run", tuple(commands)),)),
    )
    made = f"Made by optc {optc.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC."
    title = f"Speed of {', '.join(insides)}"
    return Document(title, verdict, None, tuple(summary), tuple(each for each in sections if each.parts), made)


def _figure(result: ScenarioResult) -> str:
    valid = "" if result.valid else " (INVALID by LoadGen's rules)"
    return f"{result.name} in {result.scenario}: {short(result.value or 0.0)} {result.metric}{valid}."


def _scenario_table(results: Sequence[ScenarioResult]) -> Table:
    rows = tuple(
        (
            each.scenario,
            each.name,
            "–" if each.value is None else short(each.value, 4),
            each.metric,
            str(each.batch),
            "VALID" if each.valid else "INVALID",
            "; ".join((*each.reasons, *each.mends, *each.notes)),
        )
        for each in results
    )
    return Table(
        "MLPerf's scenarios", ("scenario", "candidate", "figure", "unit", "batch", "LoadGen", "why"), rows, (2, 4)
    )


def latency_charts(measurement: Measurement) -> list[Chart]:
    """The distribution of all candidates' latencies; nothing if none was measured."""
    shown = [each for each in measurement.results if each.percentiles is not None]
    if not shown:
        return []
    return [
        latency_chart(
            [
                Latencies(each.name, np.concatenate(each.latencies_ns) / 1e6, each.name == measurement.optimized)
                for each in shown
            ]
        )
    ]


def candidates_table(measurement: Measurement) -> Table:
    """One row per candidate: precision, percentiles, queries, and what ran it or why it was not measured."""
    header = ("candidate", "precision", "p50 (ms)", "p90 (ms)", "p99 (ms)", "queries", "ran by")
    names = [each.name for each in measurement.results]
    strong = names.index(measurement.optimized) if measurement.optimized in names else None
    return Table("Percentiles", header, tuple(map(_row, measurement.results)), (2, 3, 4, 5), strong)


def _row(result: CandidateResult) -> tuple[str, ...]:
    if result.percentiles is None:
        return (result.name, result.precision, "", "", "", "", f"not measured: {result.error}")
    cells, count = latency_cells(result.percentiles, 3), str(result.percentiles.count)
    failed = f"; then failed: {result.error}" if result.error else ""
    return (result.name, result.precision, *cells, count, result.provider + failed)


def warnings(measurement: Measurement | None) -> list[str]:
    """What to know before believing the numbers, a line each."""
    return [f"{name}: {text}" if name else text for name, text in _warnings(measurement)]


def warnings_section(measurement: Measurement | None) -> Section:
    """What to know before believing the numbers; without parts if there is nothing."""
    found: dict[str, list[str]] = defaultdict(list)
    for name, text in _warnings(measurement):
        found[name or "all"].append(text)
    rows = tuple((name, "; ".join(texts)) for name, texts in found.items())
    parts = (Table("What was not as it should be", ("candidate", "what"), rows),) if rows else ()
    return Section("Before you believe the numbers", parts)


def _warnings(measurement: Measurement | None) -> Iterator[tuple[str, str]]:
    if measurement is None:
        return
    yield from (("", warning) for warning in measurement.warnings)
    if measurement.sequential_reason:
        yield "", f"candidates were measured one after another, not in turns: {measurement.sequential_reason}"
    for result in measurement.results:
        if result.blocks and result.error is not None:
            yield result.name, f"does not count, it failed later: {result.error}"
        yield from ((result.name, warning) for warning in result.warnings)


def environment(here: Machine, measurement: Measurement | None) -> tuple[str | Table, ...]:
    """The machine, what was asked of it, and the versions of what ran."""
    facts = [
        ("CPU", here.cpu),
        ("instruction sets for int8 and bfloat16", ", ".join(here.isa) if here.isa else "unknown"),
        ("cores for this process", str(here.cores)),
        ("memory for this process", megabytes(here.memory_bytes)),
        ("GPU", ", ".join(here.gpus) or "none"),
        ("system", here.system),
        ("Python", here.python),
    ]
    method: list[str] = []
    if measurement is not None:
        facts += [
            ("device", measurement.device),
            ("threads per candidate", str(measurement.threads)),
            ("images per query", str(measurement.batch)),
        ]
        turns = "taking turns in blocks" if measurement.interleaved else "one after another"
        method.append(f"Latencies were measured with MLPerf LoadGen, all candidates {turns}, raw values kept.")
    packages = tuple(here.packages.items())
    return (
        *method,
        Table("Machine", ("what", "is"), tuple(facts)),
        Table("Versions", ("package", "version"), packages),
    )


def _p50(result: CandidateResult) -> float:
    return result.percentiles.p50_ns if result.percentiles else float("inf")
