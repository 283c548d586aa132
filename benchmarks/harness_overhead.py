"""What a query costs besides the model: LoadGen and the driver around a runner that does nothing."""

from __future__ import annotations

import time

import numpy as np
from common import Result, publish

from optc import Runner
from optc.bench.loadgen import single_stream
from optc.bench.statistics import percentiles
from optc.lowering.backend import Array

LIMIT_US = 20.0
QUERIES, REPEATS = 20_000, 5


class Null(Runner):
    """Hands back an ImageNet classifier's worth of logits at once, noting when it was called."""

    provider, precision = "null", "none"

    def __init__(self) -> None:
        self.output = np.zeros((1, 1000), np.float32)
        self.entered: list[int] = []

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        self.entered.append(time.perf_counter_ns())
        return (self.output,)


def benchmark() -> Result:
    """Time from one call of the runner to the next: everything that is not the model."""
    samples = [(np.zeros((1, 3, 224, 224), np.float32),)]
    cycles, on_the_clock = [], []
    for _ in range(REPEATS):
        runner = Null()
        run = single_stream(runner, samples, QUERIES, name="null")
        cycles.append(np.diff(runner.entered))
        on_the_clock.append(run.summary.percentiles_ns["50.00"])
    whole = percentiles(cycles)
    return Result(
        claim=f"LoadGen and driver take less than {LIMIT_US:.0f} µs per query at p50.",
        held=whole.p50_ns / 1000 < LIMIT_US,
        finding=f"{whole.p50_ns / 1000:.1f} µs per query at p50",
        table=[
            {
                "part": "call to call, output checked for NaN (1000 values)",
                "p50 µs": whole.p50_ns / 1000,
                "p90 µs": whole.p90_ns / 1000,
                "p99 µs": whole.p99_ns / 1000,
            },
            {
                "part": "of that inside LoadGen's latency",
                "p50 µs": float(np.median(on_the_clock)) / 1000,
                "p90 µs": "",
                "p99 µs": "",
            },
        ],
        raw={"call_to_call_ns": [cycle.tolist() for cycle in cycles], "loadgen_p50_ns": on_the_clock},
    )


if __name__ == "__main__":
    publish("harness_overhead", benchmark)
