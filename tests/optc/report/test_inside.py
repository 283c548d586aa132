"""What is said of the time inside a model, in words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from optc.api import Optimized
from optc.bench.inside import Inside
from optc.report.inside import inside_in_words

TOO_LOW = "measured too low to say how far off that is"


@pytest.mark.parametrize(
    ("floor", "disturbed", "said"),
    [(0.5, "", "could not do their work in less than"), (0.5, "it was busy", TOO_LOW), (1.5, "", TOO_LOW)],
)
def test_no_time_is_said_to_be_impossible(
    run: tuple[Optimized, Path, Inside], floor: float, disturbed: str, said: str
) -> None:
    _, _, inside = run
    assert inside.layers_after is not None
    layers = tuple(replace(layer, floor_seconds=0.5 * layer.seconds) for layer in inside.layers_after.layers)
    profile = replace(
        inside.layers_after,
        layers=layers,
        floor_seconds=floor * inside.layers_after.seconds,
        peaks=replace(inside.layers_after.peaks, disturbed=disturbed),
    )
    assert said in inside_in_words(replace(inside, layers_after=profile))[0]
