"""The charts of where time goes: a roofline, and bars of each layer before and after."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from optc.bench.layers import Layer, LayerProfile
from optc.report.charts import logarithmic
from optc.report.document import Chart
from optc.report.svg import INK, MUTED, SERIES, element, figure
from optc.report.words import short, shortened

BARS = 12
"""Most layers shown as bars; the others are added up in one."""
_COLOURS = {"float32": SERIES[0], "bfloat16": SERIES[3], "float16": SERIES[4], "int8": SERIES[1], "int4": SERIES[2]}


def roofline_chart(profile: LayerProfile) -> Chart | None:
    """Operators by operations per byte and operations per second, under the machine's roofs; ``None`` without any.

    After Williams, Waterman and Patterson, "Roofline: an insightful visual performance model" (2009).
    """
    shown = [layer for layer in profile.layers if layer.operations and layer.bytes and layer.seconds]
    if not shown:
        return None
    intensity = np.array([layer.operations / layer.bytes for layer in shown])
    rate = np.array([layer.operations / layer.seconds for layer in shown]) / 1e9
    peaks = profile.peaks
    kinds = list(dict.fromkeys(layer.kind for layer in shown if layer.kind in peaks.operations)) or ["float32"]
    memory, cache = peaks.memory(profile.bytes) / 1e9, peaks.bandwidth[0][1] / 1e9
    ridge = max(peaks.compute(kind) for kind in kinds) / 1e9 / memory
    x = np.geomspace(intensity.min() / 2, max(intensity.max(), ridge) * 8, 200)  # roofs' names stand beyond the points
    with figure(3.8) as drawn:
        axes = drawn.add_subplot()
        for kind in kinds:
            peak = peaks.compute(kind) / 1e9
            axes.plot(x, np.minimum(peak, x * memory), color=_COLOURS.get(kind, INK), linewidth=1.6)
            axes.annotate(
                f"{kind} {peak:,.0f}", (x[-1], peak), (0, 3), textcoords="offset points", ha="right", fontsize=9
            )
        top = max(peaks.compute(kind) for kind in kinds) / 1e9
        axes.plot(x, np.minimum(top, x * cache), color=MUTED, linewidth=1, linestyle=":")
        for kind in dict.fromkeys(layer.kind for layer in shown):
            mine = [index for index, layer in enumerate(shown) if layer.kind == kind]
            sizes = [16 + 900 * shown[index].seconds / profile.seconds for index in mine]
            colour = _COLOURS.get(kind, MUTED)
            axes.scatter(
                intensity[mine], rate[mine], s=sizes, color=colour, alpha=0.6, linewidths=0, label=kind or "other"
            )
        logarithmic(axes, "x")
        logarithmic(axes, "y")
        axes.set_ylim(bottom=max(rate.min() / 2, top / 1e5))
        axes.set_xlabel("operations per byte moved, logarithmic")
        axes.set_ylabel("billion operations per second, logarithmic")
        legend = axes.legend(loc="lower right")
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_sizes([40])  # type: ignore[attr-defined]
        slowest = max(shown, key=lambda layer: layer.seconds)
        title = f"Roofline of {profile.what} (billion operations/s against operations/byte)"
        alt = (
            f"{len(shown)} operators under the machine's roofs: {memory:,.0f} GB/s of memory for this model, "
            + ", ".join(f"{peaks.compute(kind) / 1e9:,.0f} billion operations/s in {kind}" for kind in kinds)
            + f". The one that takes longest, {slowest.label}, reaches {slowest.share:.0%} of its roof."
        )
        note = (
            "A point is an operator, its area the time it takes. Sloping lines are what memory allows (solid: for a "
            "model of this size, dotted: in the cores' caches), flat ones what the type allows. On a line the machine "
            "is used up."
        )
        return Chart(title, alt, element(drawn, title, alt), note)


def bars_chart(profiles: Mapping[str, LayerProfile]) -> Chart:
    """Time per source module, the slowest first, one bar for each profile; at least one profile with a layer."""
    times = {name: by_module(profile.layers) for name, profile in profiles.items()}
    together: dict[str, float] = defaultdict(float)
    for each in times.values():
        for module, seconds in each.items():
            together[module] = max(together[module], seconds / max(sum(each.values()), 1e-12))
    ranked = sorted(together, key=lambda module: -together[module])
    shown, rest = ranked[:BARS], ranked[BARS:]
    labels = [*shown, *([f"{len(rest)} others"] if rest else [])]
    with figure(0.7 + 0.16 * len(labels) * (len(times) + 0.6)) as drawn:
        axes = drawn.add_subplot()
        height = 0.8 / len(times)
        for number, (name, each) in enumerate(times.items()):
            values = [each.get(module, 0.0) * 1e3 for module in shown]
            values += [sum(each.get(module, 0.0) for module in rest) * 1e3] if rest else []
            offsets = np.arange(len(labels)) + (number - (len(times) - 1) / 2) * height
            colour = SERIES[1] if number == len(times) - 1 else SERIES[0]
            bars = axes.barh(offsets, values, height * 0.92, color=colour, label=name)
            axes.bar_label(bars, [short(value, 2) if value else "" for value in values], padding=2, fontsize=8)
        axes.set_yticks(range(len(labels)), [shortened(label) for label in labels], fontsize=9, parse_math=False)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.set_xmargin(0.1)
        axes.set_xlabel("time of a query (ms)")
        if len(times) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(times), borderaxespad=0.0)
        title = "Time by layer (ms)" + (", before and after" if len(times) > 1 else "")
        told = "; ".join(
            f"{label} "
            + ", ".join(f"{short(each.get(label, 0.0) * 1e3, 2)} ms in {name}" for name, each in times.items())
            for label in shown[:5]
        )
        alt = f"Bars of the time that each source module takes. The largest shares: {told}."
        note = "Operators are added up by the source module they come from; what has none goes by its operator."
        return Chart(title, alt, element(drawn, title, alt), note)


def by_module(layers: tuple[Layer, ...]) -> dict[str, float]:
    """Seconds by :attr:`Layer.label`, in the order of the layers."""
    found: dict[str, float] = defaultdict(float)
    for layer in layers:
        found[layer.label] += layer.seconds
    return dict(found)
