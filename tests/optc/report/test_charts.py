"""The charts that the report draws."""

from __future__ import annotations

import re

import pytest

from optc.report.charts import Point, pareto_chart

LONG = "openvino fuse,quant streams=2 kernels=measured"


@pytest.mark.parametrize("milliseconds", [0.8, 40.0])
def test_a_name_at_an_edge_stays_within_the_axes(milliseconds: float) -> None:
    points = [Point(LONG, milliseconds, 5.6), Point("eager", 12.0, 22.0), Point("inductor", 0.8, 9.0)]
    svg = pareto_chart([*points, Point("onnxruntime", 40.0, 22.0)]).svg
    texts = re.findall(r"text-anchor: (\w+)[^>]* x=\"([\d.]+)\"[^>]*>([^<]*)</text>", svg)
    ticks_end = next(float(x) for anchor, x, text in texts if anchor == "end" and text == "5")
    width = float(re.search(r"viewBox=\"0 0 ([\d.]+)", svg)[1])  # type: ignore[index]
    anchor, x, _ = next(each for each in texts if each[2] == LONG)
    wide = 5.2 * len(LONG)
    left = float(x) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
    assert ticks_end < left
    assert left + wide < width
