"""The charts of a report about candidates: how long their queries took, and what speed costs in accuracy and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from optc.report.document import Chart
from optc.report.svg import INK, MUTED, SERIES, element, figure
from optc.report.words import P99_QUERIES, short, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

_BINS = 60
_LOG_FROM = 4.0
"""From which ratio between the slowest and the fastest candidate on an axis of latencies is logarithmic."""
_FEW_DECADES = 1000.0
_NEAR = 12.0
"""Points of print between marks whose numbers would cover each other; a list of numbers is as much wider."""


@dataclass(frozen=True)
class Latencies:
    """A candidate's latencies in ms, all queries; ``strong`` for the one the report is about."""

    name: str
    milliseconds: ArrayLike
    strong: bool = False


@dataclass(frozen=True)
class Point:
    """A candidate in the trade-off of latency (median, ms), size (MB) and accuracy (0 to 1; ``None`` if unknown)."""

    name: str
    milliseconds: float
    megabytes: float
    accuracy: float | None = None
    strong: bool = False


_REST = "p90 and, from a hundred queries on, p99; the slowest 1 % are left out."


def latency_chart(candidates: Sequence[Latencies]) -> Chart:
    """The distribution of each candidate's latencies, with p50, p90 and p99 marked; needs at least one candidate."""
    values = [np.asarray(each.milliseconds, dtype=np.float64) for each in candidates]
    marks = [np.percentile(each, (50, 90, 99)) for each in values]
    low, high = min(float(each.min()) for each in values), max(float(each[2]) for each in marks) * 1.02
    medians = [float(each[0]) for each in marks]
    wide = max(medians) / min(medians) > _LOG_FROM
    edges = np.geomspace(low, high, _BINS + 1) if wide else np.linspace(low, high, _BINS + 1)
    with figure(0.9 + 0.62 * len(candidates)) as drawn:
        axes = drawn.add_subplot()
        for row, (each, taken, mark) in enumerate(zip(candidates, values, marks, strict=True)):
            counts, _ = np.histogram(taken, edges)
            shape = 0.5 * counts / max(counts.max(), 1)
            colour = SERIES[1] if each.strong else SERIES[0]
            axes.stairs(row - shape, edges, baseline=row, fill=True, color=colour, alpha=0.55)
            shown = mark if len(taken) >= P99_QUERIES else mark[:2]
            for value, length in zip(shown, (0.56, 0.34, 0.2), strict=False):
                axes.plot([value, value], [row, row - length], color=INK, linewidth=1.6, solid_capstyle="butt")
            axes.annotate(
                short(mark[0]), (mark[0], row - 0.56), (3, -3), textcoords="offset points", va="center", fontsize=9
            )
            across = axes.get_yaxis_transform()
            place = (0, row - 0.68)
            axes.annotate(
                shortened(each.name, 60), place, (3, 0), across, "offset points", fontsize=9, parse_math=False
            )
        axes.set_yticks(range(len(candidates)), [""] * len(candidates))
        axes.set_ylim(len(candidates) - 0.8, -1.0)
        axes.grid(visible=False, axis="y")
        if wide:
            logarithmic(axes, "x")
        axes.set_xlabel("latency of a query (ms)" + (", logarithmic" if wide else ""))
        title = "How long queries took (ms)"
        told = "; ".join(
            f"{each.name} {short(mark[0])} ms at the median, {short(mark[1])} at p90"
            + (f", {short(mark[2])} at p99" if len(taken) >= P99_QUERIES else "")
            for each, mark, taken in zip(candidates, marks, values, strict=True)
        )
        alt = f"Distribution of the latencies of {len(candidates)} candidates: {told}."
        note = "Each hill shows how often a latency occurred. The three strokes mark p50 (longest, with its value), "
        return Chart(title, alt, element(drawn, title, alt), note + _REST)


def pareto_chart(points: Sequence[Point], metric: str = "accuracy") -> Chart:
    """Size, and where known accuracy, against latency; those that nothing beats in all of them are joined by a line.

    Needs at least one point. The area of a mark grows with the size. Marks are numbered, the fastest first.

    Args:
        metric: what the points' accuracy is called.
    """
    points = sorted(points, key=lambda each: each.milliseconds)
    measured = [each for each in points if each.accuracy is not None]
    panels = 2 if measured else 1
    with figure(0.5 + 2.3 * panels + 0.19 * len(points)) as drawn:
        first = drawn.add_subplot(panels, 1, 1)
        if measured:
            values = [each.accuracy * 100 for each in measured if each.accuracy is not None]
            _scatter(first, measured, values, better=1)
            first.set_ylabel(f"{metric} (%)", parse_math=False)
            first.set_ylim(min(values) - 1.5, min(max(values) + 1.5, 102))
            second = drawn.add_subplot(panels, 1, 2, sharex=first)
        else:
            second = first
        sizes = [each.megabytes for each in points]
        _scatter(second, points, sizes, better=-1)
        second.set_ylabel("size of the weights (MB)")
        second.set_ylim(0, max(sizes) * 1.15)
        medians = [each.milliseconds for each in points]
        if max(medians) / min(medians) > _LOG_FROM:
            logarithmic(second, "x")
            second.set_xlabel("median latency (ms), logarithmic")
        else:
            second.set_xlim(0, max(medians) * 1.12)
            second.set_xlabel("median latency (ms)")
        numbers = {each: number for number, each in enumerate(points, 1)}
        marks = [_mark(each) for each in points]
        names = [f"{number}  {shortened(each.name, 60)}" for each, number in numbers.items()]
        legend = drawn.legend(marks, names, loc="outside lower left", borderpad=0, handletextpad=0.2)
        for text in legend.get_texts():
            text.set_parse_math(False)
        if measured:
            _number(first, measured, values, numbers)
        _number(second, points, sizes, numbers)
        title = f"Latency (ms), size (MB) and {metric} (%)" if measured else "Latency (ms) and size (MB)"
        alt = f"Trade-off between candidates, fastest first: {'; '.join(_told(each, metric) for each in points)}."
        note = "Further left is faster, further down smaller" + (f", further up has more {metric}" if measured else "")
        joined = "The line joins those that no other beats in both."
        return Chart(title, alt, element(drawn, title, alt), f"{note}. {joined}")


def steps_chart(title: str, unit: str, names: Sequence[str], values: Sequence[float], note: str = "") -> Chart:
    """One horizontal bar for each step, the first at the top, labelled with its value; needs at least one."""
    with figure(0.6 + 0.3 * len(names)) as drawn:
        axes = drawn.add_subplot()
        bars = axes.barh(range(len(names)), values, color=SERIES[0], height=0.68)
        axes.bar_label(bars, [short(value) for value in values], padding=3, fontsize=9)
        axes.set_yticks(range(len(names)), list(names), parse_math=False)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, max(values) * 1.12 or 1)
        axes.set_xlabel(unit)
        told = ", ".join(f"{name} {short(value)}" for name, value in zip(names, values, strict=True))
        alt = f"Bars, {unit}: {told}."
        title = f"{title} ({unit})"
        return Chart(title, alt, element(drawn, title, alt), note)


def _told(point: Point, metric: str) -> str:
    accuracy = f", {point.accuracy:.1%} {metric}" if point.accuracy is not None else ""
    return f"{point.name} {short(point.milliseconds)} ms, {short(point.megabytes)} MB{accuracy}"


def _scatter(axes: Axes, points: Sequence[Point], heights: Sequence[float], better: int) -> None:
    """Points at their latencies and ``heights``; ``better`` is 1 where more is better, -1 where less is."""
    largest = max(each.megabytes for each in points) or 1.0
    best = None
    front = []
    for each, height in sorted(zip(points, heights, strict=True), key=lambda pair: (pair[0].milliseconds, pair[1])):
        if best is None or better * height > better * best:
            best = height
            front.append((each.milliseconds, height))
    axes.step(*zip(*front, strict=True), where="post", color=MUTED, linewidth=1, linestyle="--")
    for each, height in zip(points, heights, strict=True):
        axes.scatter(
            each.milliseconds,
            height,
            s=40 + 220 * each.megabytes / largest,
            color=SERIES[1] if each.strong else SERIES[0],
            alpha=0.75,
            linewidths=0,
        )
    axes.margins(0.15, 0.2)


def _mark(point: Point) -> Line2D:
    from matplotlib.lines import Line2D

    colour = SERIES[1] if point.strong else SERIES[0]
    return Line2D([], [], linestyle="", marker="o", markersize=5, color=colour, alpha=0.75, markeredgewidth=0)


def _number(axes: Axes, points: Sequence[Point], heights: Sequence[float], numbers: Mapping[Point, int]) -> None:
    """The points' numbers at their upper right, those of points that nearly coincide in one list.

    Call it when the figure has all its parts and the axes their final limits; the points come in order of latency.
    """
    figure_ = axes.get_figure(root=True)
    assert figure_ is not None
    figure_.draw_without_rendering()
    groups: list[tuple[float, float, tuple[float, float], list[str]]] = []
    for each, height in zip(points, heights, strict=True):
        place = (each.milliseconds, height)
        x, y = axes.transData.transform(place) * 72 / figure_.dpi
        near = next(
            (each for each in groups if 0 <= x - each[0] < _NEAR * len(each[3]) and abs(each[1] - y) < _NEAR), None
        )
        if near is None:
            near = (x, y, place, [])
            groups.append(near)
        near[-1].append(str(numbers[each]))
    for *_, place, found in groups:
        axes.annotate(", ".join(found), place, (5, 5), textcoords="offset points", fontsize=9)


def logarithmic(axes: Axes, axis: str) -> None:
    """Make an axis (``"x"`` or ``"y"``) logarithmic, with plain numbers at powers of ten, and at 2 and 5 if few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axes, f"set_{axis}scale")("log")
    ticks = getattr(axes, f"{axis}axis")
    low, high = getattr(axes, f"get_{axis}lim")()
    subs = (1.0, 2.0, 5.0) if high < _FEW_DECADES * low else (1.0,)
    ticks.set_major_locator(LogLocator(subs=subs))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ticks.set_minor_formatter(NullFormatter())
