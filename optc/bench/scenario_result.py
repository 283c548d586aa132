"""What a scenario found of one candidate."""

from __future__ import annotations

from dataclasses import dataclass

from optc.bench.settings import Scenario
from optc.bench.summary import LoadGenSummary

MULTISTREAM_SAMPLES = 8
METRICS: dict[Scenario, str] = {
    "SingleStream": "ms at the 90th percentile",
    "MultiStream": "ms at the 99th percentile of queries of several samples",
    "Offline": "samples/s",
    "Server": "queries/s within the latency bound",
}


@dataclass(frozen=True)
class ScenarioResult:
    """What one scenario found of one candidate. ``provider`` and ``precision`` are the runner's own words.

    Attributes:
        value, metric: the scenario's own figure and what it is: milliseconds for SingleStream and MultiStream, samples
            per second for Offline, queries per second for Server. ``None`` if there is none.
        valid: LoadGen's verdict.
        reasons, mends: why not, in plain words, and the setting that would mend each.
        queries: how many LoadGen issued.
        batch: samples run at once.
        official: whether MLPerf's full durations were asked for.
        latencies_ns: raw, of each batch inside the runner; of Server, of each query with its waiting.
        nonfinite: how many of these had outputs with a NaN or an infinity.
        loadgen: LoadGen's own account; ``None`` if it did not run or did not end.
        notes: what to know besides.
    """

    name: str
    scenario: Scenario
    official: bool
    metric: str
    value: float | None = None
    valid: bool = False
    reasons: tuple[str, ...] = ()
    mends: tuple[str, ...] = ()
    provider: str = ""
    precision: str = ""
    queries: int = 0
    batch: int = 1
    latencies_ns: tuple[int, ...] = ()
    nonfinite: int = 0
    loadgen: LoadGenSummary | None = None
    notes: tuple[str, ...] = ()


def failed(scenario: Scenario, name: str, reason: str, official: bool) -> ScenarioResult:
    """The INVALID result of a candidate that did not open or whose run failed."""
    return ScenarioResult(name, scenario, official, METRICS[scenario], reasons=(reason,))
