"""The report of a run of ``optimize`` as a document: a summary in plain words, then pictures, tables and commands."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import optc
from optc.bench.choice import rows
from optc.bench.inside import Inside
from optc.bench.results import CandidateResult, Measurement
from optc.bench.statistics import ratio_of_medians
from optc.machine import PACKAGES, Machine, machine
from optc.passmanager.contract import PassRecord
from optc.report.charts import Point, pareto_chart, steps_chart
from optc.report.deviations import deviations
from optc.report.document import Chart, Code, Document, Section, Table
from optc.report.inside import inside_in_words, inside_sections
from optc.report.measured import candidates_table, environment, latency_charts, warnings_section
from optc.report.report import Report
from optc.report.terminal import REFERENCE
from optc.report.words import distance, megabytes, milliseconds, times, what

_HALF = ("bfloat16", "float16")
_EXPLICIT = (
    "Quantize and dequantize operators are explicit in the graph and counted; runtimes fold them into their kernels."
)


def optimized_document(
    report: Report, artifact: Path, commands: Sequence[str], inside: Inside | None = None
) -> Document:
    """What a run found out, for people.

    Args:
        artifact: the folder that the run wrote.
        commands: lines that make the same again.
        inside: time by layer and memory, where they were looked at.
    """
    here = machine()
    sections = [
        warnings_section(report.measurement),
        Section("Speed", _speed(report)),
        *(inside_sections(inside) if inside else ()),
        Section("What each pass did and gained", _passes(report)),
        Section("Otherwise than asked", _deviations(report)),
        Section("Where it ran", environment(here, report.measurement)),
        Section("Make it again", _again(report, artifact, commands, here)),
    ]
    return Document(
        title=f"{report.model.name}: before and after optc",
        verdict=_headline(report),
        good=report.faster if report.measurement else None,
        summary=(*_summary(report), *(inside_in_words(inside) if inside else ())),
        sections=tuple(section for section in sections if section.parts),
        made=f"Made by optc {optc.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
    )


def _headline(report: Report) -> str:
    """What the run is about, in one sentence a layman can read."""
    name, measurement = report.model.name, report.measurement
    subject = measurement[measurement.optimized] if measurement and measurement.optimized else None
    if subject is not None and subject.error is not None:
        return f"{name} was optimized, and failed when it was measured: {subject.error}."
    if measurement is None or subject is None or subject.percentiles is None:
        return f"{name} was optimized; its speed was not measured."
    query = f" a query of {measurement.batch}" if measurement.batch > 1 else ""
    took = f"{name} answers{query} in {milliseconds(subject.percentiles.p50_ns / 1e9)}"
    if measurement.ratio is None or measurement.baseline is None:
        return f"{took}; there was nothing to compare it with."
    ratio, baseline = measurement.ratio, measurement.baseline
    match ratio.outcome:
        case "faster":
            return f"{took}, {times(1 / ratio.value)} as fast as the best unquantized PyTorch, {baseline}."
        case "slower":
            return f"{took}, which is slower than {baseline}, the best unquantized PyTorch."
        case _:
            return f"{took}, no faster than {baseline}, the best unquantized PyTorch, as far as was shown."


def _summary(report: Report) -> list[str]:
    lines = []
    measurement = report.measurement
    ratio = measurement.ratio if measurement else None
    if ratio and measurement and measurement.baseline and ratio.low > 0:
        lines.append(
            f"The speed is {1 / ratio.value:.2f} times that of {measurement.baseline}; with {ratio.confidence:.0%}"
            f" confidence it lies between {1 / ratio.high:.2f} and {1 / ratio.low:.2f} times."
        )
    plain, subject = _result(measurement, REFERENCE), _result(measurement, measurement.optimized if measurement else "")
    if plain and subject and measurement and measurement.baseline != REFERENCE:
        longer = ratio_of_medians(plain.latencies_ns, subject.latencies_ns, interleaved=measurement.interleaved).value
        lines.append(f"Plain PyTorch in float32 takes {times(longer)} as long.")
    accuracy = report.accuracy
    if accuracy.before is not None and accuracy.after is not None:
        change, on = accuracy.after - accuracy.before, f" on {accuracy.data}" if accuracy.data else ""
        metric = f"{accuracy.metric[:1].upper()}{accuracy.metric[1:]}"
        lines.append(
            f"{metric} went from {accuracy.before:.2%} to {accuracy.after:.2%} ({change * 100:+.2f} points){on}."
        )
    else:
        lines.append(f"Accuracy: {accuracy.reason}.")
    if report.budget:
        lines.append(f"The accuracy budget: {report.budget.text}.")
    share = report.file_bytes / report.model_bytes if report.model_bytes else 1.0
    lines.append(
        f"Its files take {megabytes(report.file_bytes)}, {share:.0%} of the original weights"
        f" ({megabytes(report.model_bytes)})."
    )
    lines.append(f"It runs in {report.provider} and computes in {report.precision}.")
    changed = [record for record in report.passes if record.modified]
    if changed:
        before = changed[0].notes["statistics"]["operators"][0]
        after = changed[-1].notes["statistics"]["operators"][1]
        lines.append(f"{len(changed)} passes changed the model, which went from {before} to {after} operators.")
    checked = next((record for record in reversed(changed) if "verify" in record.notes), None)
    if checked is not None:
        found = distance(checked)
        told = "are equal to" if found == "equal" else f"keep {found} of"
        lines.append(
            f"After the last pass the outputs {told} the original's (signal to noise, on verification inputs)."
        )
    elif changed:
        lines.append("The outputs were not compared with the original's.")
    return [*lines, *report.notes]


def _speed(report: Report) -> tuple[str | Chart | Table | Code, ...]:
    parts: list[str | Chart | Table | Code] = [report.verdict]
    if report.measurement is not None:
        parts += latency_charts(report.measurement)
        points = _points(report)
        if points:
            parts.append(pareto_chart(points, report.accuracy.metric))
        parts.append(candidates_table(report.measurement))
    if report.backends:
        header = ("backend", "precision", "p50 (ms)", "size (MB)", "made in (s)", "why")
        parts.append(Table("Backends tried", header, tuple(rows(report.backends)), (2, 3, 4), 0))
    return tuple(parts)


def _points(report: Report) -> list[Point]:
    """Candidates by latency, size and accuracy. Files as they are, else the weights in their type."""
    measurement = report.measurement
    assert measurement is not None
    size = report.model_bytes / 1e6
    points = []
    for result in measurement.results:
        if result.percentiles is None or result.error is not None:
            continue
        p50 = result.percentiles.p50_ns / 1e6
        if result.name == measurement.optimized:
            points.append(Point(result.name, p50, report.file_bytes / 1e6, report.accuracy.after, strong=True))
        elif result.name == REFERENCE:
            points.append(Point(result.name, p50, size, report.accuracy.before))
        elif not result.quantized and not result.name.startswith("optc "):
            points.append(Point(result.name, p50, size / 2 if result.precision in _HALF else size))
    here = {result.percentiles.p50_ns / 1e6 for result in measurement.results if result.percentiles is not None}
    others = (each for each in report.backends if not each.chosen and each.p50_ms and each.file_bytes)
    others = (each for each in others if each.p50_ms in here)  # a choice that is recalled has those of another day
    points += [Point(f"optc {each.title}", each.p50_ms or 0.0, (each.file_bytes or 0) / 1e6) for each in others]
    return points


def _passes(report: Report) -> tuple[str | Chart | Table | Code, ...]:
    changed = [record for record in report.passes if record.modified]
    parts: list[str | Chart | Table | Code] = []
    if changed:
        stages = ["captured", *(f"after {record.name}" for record in changed)]
        statistics = [record.notes["statistics"] for record in changed]
        operators = [statistics[0]["operators"][0], *(each["operators"][1] for each in statistics)]
        sizes = [statistics[0]["constant_bytes"][0], *(each["constant_bytes"][1] for each in statistics)]
        parts.append(steps_chart("The graph, pass by pass", "number of operators", stages, operators, _EXPLICIT))
        parts.append(steps_chart("Its weights, pass by pass", "MB", stages, [size / 1e6 for size in sizes]))
        parts.append(_pass_table(changed))
    idle = dict.fromkeys(record.name for record in report.passes if not record.modified)
    if idle:
        parts.append(f"Nothing to do for {', '.join(idle)}.")
    skipped = _skipped(report.passes)
    if skipped.rows:
        parts.append(skipped)
    parts += [table for record in report.passes if (table := _account(record))]
    if report.calibration:
        parts.append(f"Activation ranges come from {report.calibration}.")
    return tuple(parts)


def _pass_table(records: Sequence[PassRecord]) -> Table:
    rows = []
    for record in records:
        statistics = record.notes["statistics"]
        (before, after), (size_before, size_after) = statistics["operators"], statistics["constant_bytes"]
        rows.append(
            (
                record.name,
                what(record),
                f"{before} → {after}",
                f"{megabytes(size_before)} → {megabytes(size_after)}",
                distance(record),
                f"{record.notes['timing']['seconds']:.2f}",
            )
        )
    header = ("pass", "what it did", "operators", "weights", "outputs against the original", "time (s)")
    return Table("Passes that changed the model", header, tuple(rows), (2, 3, 4, 5))


def _skipped(records: Sequence[PassRecord]) -> Table:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        for skip in record.skipped:
            groups[record.name, skip.reason].append(skip.node)
    rows = tuple((name, ", ".join(nodes), reason) for (name, reason), nodes in groups.items())
    return Table("Considered and left as it was", ("pass", "not done", "why"), rows, folded=True)


def _account(record: PassRecord) -> Table | None:
    """The rows that a pass's choice rests on, columns as the pass names them."""
    account = record.notes.get("account", ())
    columns = list(dict.fromkeys(key for row in account for key in row))
    if not columns:
        return None
    cells = tuple(tuple(_cell(row.get(column, "")) for column in columns) for row in account)
    return Table(f"What {record.name} chose from", tuple(map(str, columns)), cells, folded=True)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    return str(value)


def _deviations(report: Report) -> tuple[str | Chart | Table | Code, ...]:
    found = tuple(deviations(report.lowering, every=True))
    return (Table(f"What {report.backend} does otherwise", ("what", "where", "why"), found),) if found else ()


def _again(
    report: Report, artifact: Path, commands: Sequence[str], here: Machine
) -> tuple[str | Chart | Table | Code, ...]:
    packages = {name: here.packages[name] for name in PACKAGES if name in here.packages and name != "optc"}
    versions = [f"{name}=={version.partition('+')[0]}" for name, version in packages.items()]
    lines = [f"pip install {' '.join(versions)}", *commands]
    parts: list[str | Chart | Table | Code] = [Code("The same run", tuple(lines))]
    if (artifact / "run.py").exists():
        parts.append(Code("The result without optc", (shlex.join(("python", str(artifact / "run.py"))),)))
    model = {key: value for key, value in asdict(report.model).items() if key not in ("notes", "preprocessing")}
    parts.append(
        Table("Model", ("what", "is"), tuple((key.replace("_", " "), str(value)) for key, value in model.items()))
    )
    steps = tuple((name, f"{seconds:.1f}") for name, seconds in report.seconds.items())
    parts.append(Table("Where the run's own time went", ("step", "time (s)"), steps, (1,), folded=True))
    return tuple(parts)


def _result(measurement: Measurement | None, name: str | None) -> CandidateResult | None:
    """What was measured of a candidate, if anything was."""
    for result in measurement.results if measurement else ():
        if result.name == name and result.percentiles is not None and result.error is None:
            return result
    return None
