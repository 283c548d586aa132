"""MLPerf's scenarios over any runner: MultiStream, Offline and Server, and SingleStream at full length."""

from __future__ import annotations

import math
import statistics as plain
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optc.bench.loadgen import log_files, start_test
from optc.bench.scenario_result import METRICS, ScenarioResult
from optc.bench.settings import Scenario, loadgen_settings
from optc.bench.summary import LoadGenSummary, read_summary
from optc.bench.suts import BatchSystem, QueueSystem, Samples
from optc.bench.verdict import explain
from optc.errors import MeasurementError, one_line
from optc.lowering.backend import Runner

OFFLINE_BATCHES = (1, 8, 32)
SECONDS = 8.0
"""About how long one run of a scenario takes, unless it is official."""
PERCENTILE_QUERIES = 662
"""What LoadGen wants to vouch for a 99th percentile with no query over the bound."""
_PROBES, _PROBE_SECONDS = 7, 2.0
_HEADROOM, _ATTEMPTS = 0.85, 8
_LEAST_EXPECTED_NS = 50_000
"""LoadGen makes all queries beforehand, twice as many as fit into the run: for less, they would fill the memory."""
_MOST_SAMPLES = 100_000


@dataclass(frozen=True)
class Plan:
    """How scenarios are run.

    Attributes:
        model: name for keys in ``user_conf``.
        official: MLPerf's full durations and counts.
        seconds: about how long a run takes otherwise.
        log_folder: where LoadGen's logs stay, by scenario; ``None`` to drop them.
        threads: intra-op threads.
    """

    model: str
    threads: int
    official: bool = False
    user_conf: Path | None = None
    seconds: float = SECONDS
    log_folder: Callable[[Scenario], Path] | None = None

    def logs(self, scenario: Scenario) -> Path | None:
        """The folder for a scenario's logs."""
        return self.log_folder(scenario) if self.log_folder else None


def run_scenario(
    scenario: Scenario,
    runner: Runner,
    samples: Samples,
    name: str,
    plan: Plan,
    *,
    batch: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> ScenarioResult:
    """Run one scenario on an open runner.

    Args:
        samples: inputs of one sample each, batch dimension 1.
        batch: the only batch size to run at; ``None`` for the scenario's own, of Offline the best of several.

    Raises:
        MeasurementError: the runner raised (names the sample), ``user_conf`` is not valid, or LoadGen could not run.
        KeyboardInterrupt: SIGINT arrived; the run ended first.
    """
    run = _Run(scenario, runner, samples, name, plan, batch, progress)
    return run.server() if scenario == "Server" else run.batches()


class _Run:
    def __init__(
        self,
        scenario: Scenario,
        runner: Runner,
        samples: Samples,
        name: str,
        plan: Plan,
        batch: int | None,
        progress: Callable[[str], None],
    ) -> None:
        self.scenario, self.runner, self.samples, self.name = scenario, runner, samples, name
        self.plan, self.only_batch, self.progress = plan, batch, progress
        self.notes: list[str] = []
        settings = loadgen_settings(scenario, plan.model, {}, plan.user_conf)
        self.per_query = settings.multi_stream_samples_per_query if scenario == "MultiStream" else 1
        self.metric = f"ms at the 99th percentile, {self.per_query} samples a query"
        if scenario != "MultiStream":
            self.metric = METRICS[scenario]

    def batches(self) -> ScenarioResult:
        """SingleStream, MultiStream or Offline."""
        batch, seconds = self._batch()
        latency = seconds * math.ceil(self.per_query / batch)
        rate = batch / seconds * self._side_by_side
        expected = max(_LEAST_EXPECTED_NS, int(0.8e9 * latency))
        values: dict[str, Any] = {
            "single_stream_expected_latency_ns": expected,
            "multi_stream_expected_latency_ns": expected,
            "offline_expected_qps": rate,
        }
        if not self.plan.official:
            values |= {"min_duration_ms": 0, "min_query_count": self._queries(latency, batch, rate)}
        self.progress(f"{self.name}, {self.scenario}")
        system: BatchSystem | QueueSystem
        if self._side_by_side > 1:
            system = QueueSystem(self.runner, self.samples, self.name, self.plan.threads, batch)
        else:
            system = BatchSystem(self.runner, self.samples, self.name, batch)
        summary = self._summary(system, values, self.plan.logs(self.scenario))
        ran = len(system.latencies_ns)
        queries = 1 if self.scenario == "Offline" else ran // math.ceil(self.per_query / batch)
        percentile = {"SingleStream": "90", "MultiStream": "99"}.get(self.scenario)
        if percentile is None:
            return self._concluded(summary.samples_per_second, self.metric, summary, system, queries, batch)
        estimate = summary.estimates_ns.get(percentile)
        metric = f"{self.metric}, as LoadGen vouches for" if estimate else self.metric
        value = (estimate or summary.percentiles_ns[f"{percentile}.00"]) / 1e6
        return self._concluded(value, metric, summary, system, queries, batch)

    def server(self) -> ScenarioResult:
        """The highest rate of arrivals whose latency stays within the bound, and one run at it."""
        settings = loadgen_settings("Server", self.plan.model, {}, self.plan.user_conf)
        bound_ns, given = settings.server_target_latency_ns, settings.server_target_qps
        asked = self.plan.user_conf is not None and given != 1.0
        batch, seconds = self._time(self.only_batch or 1)
        if seconds * 1e9 > bound_ns and not asked:
            reason = f"one query alone takes {seconds * 1e3:.3g} ms, more than the bound of {bound_ns / 1e6:g} ms"
            mend = "raise *.Server.target_latency in --user-conf"
            return self._result(reasons=(reason,), mends=(mend,))
        rate = given if asked else self._search(self._side_by_side / seconds, bound_ns)
        for _ in range(_ATTEMPTS):
            self.progress(f"{self.name}, Server at {rate:.4g} queries/s")
            summary, system = self._serve(rate, bound_ns, self.plan.logs("Server"), final=True)
            if asked or _within(summary):
                break
            rate *= _HEADROOM
        metric = f"queries/s within {bound_ns / 1e6:g} ms"
        value = summary.samples_per_second if _within(summary) else None
        return self._concluded(value, metric, summary, system, len(system.latencies_ns), batch)

    def _search(self, capacity: float, bound_ns: int) -> float:
        """Bisect between nothing and what the runner would give if it never waited for a query."""
        low, high = 0.0, capacity
        for probe in range(_PROBES):
            rate = (low + high) / 2
            self.progress(f"{self.name}, Server, probe {probe + 1} of {_PROBES}: {rate:.4g} queries/s")
            summary, _ = self._serve(rate, bound_ns, None, final=False)
            low, high = (rate, high) if _within(summary) else (low, rate)
        return low or high / 2

    def _serve(
        self, rate: float, bound_ns: int, logs: Path | None, *, final: bool
    ) -> tuple[LoadGenSummary, QueueSystem]:
        seconds = self.plan.seconds if final else _PROBE_SECONDS * self.plan.seconds / SECONDS
        least = PERCENTILE_QUERIES if final else 100
        values: dict[str, Any] = {
            "server_target_qps": rate,
            "server_max_async_queries": max(16, math.ceil(8 * rate * bound_ns / 1e9)),
        }
        if not (final and self.plan.official):
            count = min(max(least, math.ceil(rate * seconds / 2)), math.ceil(rate * seconds))
            values |= {"min_duration_ms": 0, "min_query_count": max(2, count)}
        system = QueueSystem(self.runner, self.samples, self.name, self.plan.threads, self.only_batch or 1)
        return self._summary(system, values, logs), system

    def _summary(self, system: BatchSystem | QueueSystem, values: dict[str, Any], logs: Path | None) -> LoadGenSummary:
        """Run LoadGen on the system to the end.

        Raises:
            MeasurementError: the runner failed.
        """
        settings = loadgen_settings(self.scenario, self.plan.model, values, self.plan.user_conf)
        with log_files(logs) as folder, closing(system), _quick_switches():
            start_test(system, settings, len(self.samples), folder)
            system.close()
            system.raise_failure()
            return read_summary(folder / "mlperf_log_summary.txt")

    @property
    def _side_by_side(self) -> int:
        """How many batches are run at a time: a stream's queries follow one another."""
        return self.runner.concurrency if self.scenario in ("Offline", "Server") else 1

    def _batch(self) -> tuple[int, float]:
        """How many samples to run at once, and the seconds a batch takes."""
        if self.only_batch is not None:
            return self._time(self.only_batch)
        if self.scenario == "SingleStream":
            return self._time(1)
        if self.scenario == "MultiStream":
            return self._time(self.per_query)
        timed = dict(self._time(batch) for batch in OFFLINE_BATCHES)
        return max(timed.items(), key=lambda item: item[0] / item[1])

    def _time(self, batch: int) -> tuple[int, float]:
        """Warm up and time a batch; where the runner takes one sample only, that."""
        self.progress(f"{self.name}, {self.scenario}, warming up at batch {batch}")
        inputs = [np.concatenate([part] * batch) for part in self.samples[0]] if batch > 1 else self.samples[0]
        taken: list[float] = []
        try:
            while len(taken) < 3 or (sum(taken) < 0.3 and len(taken) < 100):
                start = time.perf_counter()
                self.runner(*inputs)
                taken.append(time.perf_counter() - start)
        except Exception as error:
            if batch == 1:
                raise MeasurementError(f"'{self.name}' failed on sample 0 (warming up): {one_line(error)}") from error
            self.notes.append(f"takes no batch of {batch} ({type(error).__name__}): its samples run one by one")
            return self._time(1)
        return batch, max(plain.median(taken[1:]), 1e-7)

    def _queries(self, latency: float, batch: int, rate: float) -> int:
        seconds = self.plan.seconds
        if self.scenario == "Offline":
            return max(batch, math.ceil(min(rate * seconds / 2, _MOST_SAMPLES) / batch) * batch)
        least = PERCENTILE_QUERIES if self.scenario == "MultiStream" else 64
        return max(1, min(max(least, int(seconds / 4 / latency)), int(seconds / latency), _MOST_SAMPLES))

    def _concluded(
        self,
        value: float | None,
        metric: str,
        summary: LoadGenSummary,
        system: BatchSystem | QueueSystem,
        queries: int,
        batch: int,
    ) -> ScenarioResult:
        reasons, mends = explain(summary, queries)
        if system.nonfinite:
            self.notes.append(f"{system.nonfinite} of {len(system.latencies_ns)} batches returned NaN or infinity")
        return self._result(
            value=value,
            metric=metric,
            valid=summary.valid,
            reasons=reasons,
            mends=mends,
            queries=queries,
            batch=batch,
            latencies_ns=tuple(system.latencies_ns),
            nonfinite=system.nonfinite,
            loadgen=summary,
        )

    def _result(self, **found: Any) -> ScenarioResult:
        side_by_side = [f"{self._side_by_side} calls at a time"] if self._side_by_side > 1 else []
        known: dict[str, Any] = {
            "name": self.name,
            "scenario": self.scenario,
            "official": self.plan.official,
            "metric": self.metric,
            "provider": self.runner.provider,
            "precision": self.runner.precision,
            "notes": tuple(dict.fromkeys([*self.notes, *side_by_side])),
        }
        return ScenarioResult(**{**known, **found})


def _within(summary: LoadGenSummary) -> bool:
    """Whether a Server run kept its bound to the end; too few queries to vouch for it are no objection here."""
    return not any(word in reason for reason in summary.reasons for word in ("Performance constraints", "Min queries"))


@contextmanager
def _quick_switches() -> Iterator[None]:
    """Let the thread that takes arrivals in have the interpreter soon while another computes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
