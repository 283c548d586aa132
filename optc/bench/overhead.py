"""What the harness itself costs: LoadGen and the driver around the ``null`` backend."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from optc.bench.loadgen import single_stream
from optc.lowering.backend import Array
from optc.lowering.null import NullRunner

QUERIES = 2000
_CLASSES = 1000


@dataclass(frozen=True)
class Overhead:
    """Medians over ``queries`` queries, in ns.

    Attributes:
        loadgen_ns: what LoadGen's latencies hold besides the model.
        query_ns: from one query to the next: with what is done off the clock, as looking for NaN.
    """

    loadgen_ns: float
    query_ns: float
    queries: int


def harness_overhead(inputs: tuple[Array, ...]) -> Overhead:
    """Measure on a model's own inputs; the null backend answers with a classifier's 1000 scores."""
    runner = _Noting()
    run = single_stream(runner, [inputs], QUERIES, name="null")
    return Overhead(float(run.summary.percentiles_ns["50.00"]), float(np.median(np.diff(runner.entered))), QUERIES)


class _Noting(NullRunner):
    def __init__(self) -> None:
        super().__init__([[None, _CLASSES]])
        self.entered: list[int] = []

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        self.entered.append(time.perf_counter_ns())
        return super().__call__(*inputs)
