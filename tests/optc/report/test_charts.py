"""The charts that the report draws."""

from __future__ import annotations

import re

import numpy as np

from optc.bench.layers import profiled
from optc.bench.peaks import Peaks
from optc.lowering.kernel_times import KernelTime
from optc.report.charts import Latencies, Point, latency_chart, pareto_chart, steps_chart
from optc.report.layer_charts import bars_chart

LONG = "optc openvino fuse,quant streams=2 kernels=measured"


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_points_are_numbered_by_latency_and_those_that_coincide_share_a_list() -> None:
    points = [
        Point("eager", 40.0, 22.0, 0.98),
        Point(LONG, 0.8, 5.6, 0.97),
        Point("optc openvino fuse,quant", 0.801, 5.6, 0.97),
        Point("inductor", 12.0, 9.0),
    ]
    found = texts(pareto_chart(points).svg)
    legend = [text for text in found if re.match(r"\d  ", text)]
    assert legend == [f"1  {LONG}", "2  optc openvino fuse,quant", "3  inductor", "4  eager"]
    assert found.count("1, 2") == found.count("4") == 2, "in the panel of accuracies and in that of sizes"
    assert found.count("3") == 1, "its accuracy is not known"


def test_a_list_takes_in_what_it_would_cover() -> None:
    milliseconds = (3.2, 3.42, 3.5, 20.0)
    found = texts(pareto_chart([Point(str(each), each, 6.5) for each in milliseconds]).svg)
    assert "1, 2, 3" in found


def test_points_that_lie_apart_are_numbered_each() -> None:
    found = texts(pareto_chart([Point("small", 5.0, 5.0), Point("large", 5.0, 50.0)]).svg)
    assert {"1", "2"} <= set(found)
    assert "1, 2" not in found


def test_latencies_are_named_in_full() -> None:
    found = texts(latency_chart([Latencies(LONG, np.array([1.0, 2.0, 3.0]), strong=True)]).svg)
    assert LONG in found
    assert "2" in found, "the median, at its stroke"


def test_names_are_text_and_no_formulas() -> None:
    name = "runs/$a_{$b"
    peaks = Peaks(1, {"float32": 1e9}, ((1.0, 1e9),))
    charts = (
        latency_chart([Latencies(name, np.array([1.0, 2.0, 3.0]))]),
        pareto_chart([Point(name, 5.0, 5.0, 0.9)], metric=name),
        steps_chart("Passes", "ms", [name], [1.0]),
        bars_chart({"net": profiled("net", [KernelTime("k", name, 1e-3)], (), {}, peaks)}),
    )
    for chart in charts:
        assert any(name in text for text in texts(chart.svg)), chart.title
