"""Where the time goes, for people: in words, charts and a table."""

from __future__ import annotations

from collections import defaultdict

from rich.table import Table as TerminalTable
from rich.text import Text

from optc.bench.layers import LayerProfile
from optc.bench.peaks_cache import peaks_file
from optc.report.document import Chart, Section, Table
from optc.report.layer_charts import bars_chart, roofline_chart
from optc.report.words import megabytes, milliseconds

SHOWN = 20
"""How many operators a terminal shows."""
BOUNDS = {
    "compute": "compute",
    "memory": "memory",
    "overhead": "neither",
    "": "–",
}
"""What an operator's time is said to be bound by."""
_BEYOND, _TICK = 1.1, 5e-5
"""Shares and times that no rounding of a profiler's microseconds explains."""
_HEADER = (
    "layer",
    "runs",
    "type",
    "time (ms)",
    "share of time",
    "MFLOP",
    "MB",
    "least (ms)",
    "of its roof",
    "bound by",
)
_NUMBERS = (3, 4, 5, 6, 7, 8)


def where_section(after: LayerProfile | None, before: LayerProfile | None = None) -> Section:
    """Where the time of a model goes; ``before`` is what it is shown beside, or alone."""
    if after is None:
        if before is None:
            return Section("Where the time goes", ())
        after, before = before, None
    profiles = {"before": before, "after": after} if before is not None else {after.what: after}
    parts: list[str | Chart | Table] = [*in_words(after)]
    roofline = roofline_chart(after)
    parts += [roofline] if roofline else []
    if all(profile.layers for profile in profiles.values()):
        parts.append(bars_chart(profiles))
    parts.append(Table(f"Operators of {after.what}, as they ran", _HEADER, _rows(after), _NUMBERS, folded=True))
    if before is not None:
        parts.append(Table(f"Operators before ({before.what})", _HEADER, _rows(before), _NUMBERS, folded=True))
    parts.append(_peaks_table(after))
    return Section("Where the time goes", tuple(parts))


def in_words(profile: LayerProfile) -> list[str]:
    """The sum, the floor of the whole model, and what the time is bound by."""
    lines = [f"The operators of {profile.what} take {milliseconds(profile.seconds)} together."]
    if profile.operations and profile.floor_seconds < profile.seconds:
        what = {
            "compute": f"for its {profile.operations / 1e9:.3g} billion operations",
            "memory": f"to read {megabytes(profile.bytes)} of weights and inputs once",
        }[profile.bound]
        share = profile.floor_seconds / profile.seconds
        lines.append(
            f"The machine needs at least {milliseconds(profile.floor_seconds)} {what}, as fast as it was seen to go: "
            f"{share:.0%} of the time the operators take."
        )
    shares: dict[str, float] = defaultdict(float)
    for layer in profile.layers:
        shares[layer.bound] += layer.seconds / (profile.seconds or 1.0)
    words = {
        "compute": "in operators bound by compute",
        "memory": "in operators bound by memory",
        "overhead": "in operators bound by neither, where calls, copies or an unfit kernel cost more than the work",
        "": "in operators that only move data or do a small part of a node",
    }
    told = [f"{shares[bound]:.0%} {text}" for bound, text in words.items() if round(shares[bound], 2)]
    if told:
        lines.append(f"Of the time, {'; '.join(told)}.")
    if is_beyond(profile):
        file = peaks_file(profile.peaks.threads)
        again = "the next report measures" if profile.peaks.disturbed else f"delete {file} to measure"
        lines.append(f"Some operators go beyond their roof: its peaks were measured too low; {again} them again.")
    return lines


def is_beyond(profile: LayerProfile) -> bool:
    """Whether operators, or all of them together, are faster than the machine was seen to go."""
    if profile.operations and profile.floor_seconds >= profile.seconds > _TICK:
        return True
    return any(layer.share > _BEYOND and layer.seconds > _TICK for layer in profile.layers)


_WIDEST_OPERATOR = 26


def where_table(profile: LayerProfile, name: str) -> TerminalTable:
    """The slowest operators of a profile of ``name`` for a terminal; those beyond :data:`SHOWN` in one row."""
    columns = ("layer", "runs", "type", "ms", "share", "of roof", "bound by")
    table = TerminalTable(
        *columns, title=f"Where the time of {name} goes ({profile.what})", title_justify="left", box=None,
        pad_edge=False, header_style="bold", caption="\n".join(in_words(profile)), caption_justify="left",
    )  # fmt: skip
    for column in (3, 4, 5):
        table.columns[column].justify = "right"
    for each in table.columns[1:]:
        each.no_wrap = True
    table.columns[1].max_width = _WIDEST_OPERATOR
    rows = sorted(_rows(profile), key=lambda row: -float(row[3]))
    for row in rows[:SHOWN]:
        table.add_row(*map(Text, (*row[:5], row[8], row[9])))
    rest = sum(float(row[3]) for row in rows[SHOWN:])
    if rows[SHOWN:]:
        share = rest / 1e3 / (profile.seconds or 1.0)
        table.add_row(f"{len(rows) - SHOWN} others", "", "", f"{rest:.3f}", f"{share:.1%}", "", "", style="dim")
    return table


def _rows(profile: LayerProfile) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            layer.label,
            layer.operator,
            layer.kind,
            f"{layer.seconds * 1e3:.3f}",
            f"{layer.seconds / (profile.seconds or 1.0):.1%}",
            f"{layer.operations / 1e6:.3g}" if layer.bound else "",
            f"{layer.bytes / 1e6:.3g}" if layer.bound else "",
            f"{layer.floor_seconds * 1e3:.3f}" if layer.bound else "",
            f"{layer.share:.0%}" if layer.bound and layer.seconds else "",
            BOUNDS[layer.bound],
        )
        for layer in profile.layers
    )


def _peaks_table(profile: LayerProfile) -> Table:
    peaks = profile.peaks
    rows = [
        (f"matrix products in {kind}", f"{rate / 1e9:,.0f}", "billion operations/s")
        for kind, rate in peaks.operations.items()
    ]
    rows += [(f"memory, {megabytes(size)} in turns", f"{rate / 1e9:,.0f}", "GB/s") for size, rate in peaks.bandwidth]
    title = f"What this machine reached at best with {peaks.threads} threads, {peaks.measured.partition('T')[0]}"
    if peaks.disturbed:
        title += f" ({peaks.disturbed})"
    return Table(title, ("what", "peak", "unit"), tuple(rows), (1,), folded=True)
