"""The report of a measurement alone: what its first sentence says of what was measured."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import pytest

from optc import Runner, Target
from optc.bench.accuracy import AccuracyResult
from optc.bench.measure import measure
from optc.bench.results import Candidate
from optc.report.measured import measured_document


class Sleeps(Runner):
    """Takes some time, and returns one number."""

    provider, precision = "test runtime", "float32"

    def __init__(self, seconds: float, value: float) -> None:
        self.seconds, self.value = seconds, value

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        time.sleep(self.seconds)
        return (np.full((1, 1), self.value, np.float32),)


@pytest.mark.parametrize(
    ("slow", "first", "ends"),
    [(1.0, "slow", ", of those that return no NaN or infinity."), (np.inf, "quick", ", and returns NaN or infinity.")],
)
def test_the_first_sentence_passes_over_what_returned_nan(slow: float, first: str, ends: str) -> None:
    runners = {"quick": Sleeps(0.001, np.nan), "slow": Sleeps(0.01, slow)}
    candidates = [Candidate(name, "float32", False, partial(lambda r: r, each)) for name, each in runners.items()]
    query = [(np.zeros((1, 1), np.float32),)]
    measured = measure(candidates, query, Target(threads=1), blocks=2, block_seconds=0.02)
    accuracy = AccuracyResult("slow", "Offline", 3, 4, "digits test")
    document = measured_document(measured, [], {}, [], [], [accuracy])
    assert document.verdict.startswith(f"{first} has the lowest median latency, ")
    assert document.verdict.endswith(ends)
    assert "slow in Offline: top-1 75.00%, 3 of 4 images (digits test)." in document.summary
