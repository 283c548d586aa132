"""MLPerf LoadGen's SingleStream scenario over any :class:`~optc.Runner`: each query issued when the last is done."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from optc.bench.summary import LoadGenSummary, read_summary
from optc.errors import MeasurementError
from optc.lowering.backend import Array, Runner

_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class SingleStreamRun:
    """What one LoadGen run measured.

    Attributes:
        latencies_ns: int64, one per query in the order issued: the time inside the runner, without the harness.
        summary: LoadGen's own verdict and percentiles; its latencies include the harness.
        nonfinite_queries: queries whose outputs held a NaN or an infinity.
        log_folder: where LoadGen's logs are; ``None`` if they were not kept.
    """

    latencies_ns: NDArray[np.int64]
    summary: LoadGenSummary
    nonfinite_queries: int
    log_folder: Path | None


def single_stream(
    runner: Runner,
    samples: Sequence[tuple[Array, ...]],
    queries: int,
    *,
    name: str = "model",
    log_folder: Path | None = None,
) -> SingleStreamRun:
    """Issue ``queries`` queries one after another, their inputs drawn from ``samples`` by LoadGen.

    The number of queries is fixed, not the duration, so a run that fails or is interrupted ends at once.

    Args:
        samples: inputs of one query each, one array per model input; held in memory throughout.
        name: what errors call the runner.
        log_folder: keep LoadGen's logs here instead of dropping them.

    Raises:
        MeasurementError: the runner raised (names the sample and the query), or LoadGen could not run.
        KeyboardInterrupt: SIGINT arrived; the run ended after the query in flight.
    """
    if queries < 1 or not samples:
        raise MeasurementError(f"nothing to measure: {queries} queries over {len(samples)} samples")
    with log_files(log_folder) as folder:
        sut = _SystemUnderTest(runner, samples, name)
        start_test(sut, _single_stream_settings(queries), len(samples), folder)
        sut.raise_failure(queries)
        return SingleStreamRun(
            latencies_ns=np.asarray(sut.latencies, dtype=np.int64),
            summary=read_summary(folder / "mlperf_log_summary.txt"),
            nonfinite_queries=sut.nonfinite,
            log_folder=log_folder,
        )


class _SystemUnderTest:
    """What LoadGen calls back from C++: an exception that left a callback would end the process, so none may."""

    def __init__(self, runner: Runner, samples: Sequence[tuple[Array, ...]], name: str) -> None:
        self.name = name
        self.latencies: list[int] = []
        self.nonfinite = 0
        self.failure: BaseException | None = None
        self.failed_sample = 0
        self.interruptible = False
        self.issue = self._issuer(runner, samples)

    def _issuer(
        self, runner: Runner, samples: Sequence[tuple[Array, ...]]
    ) -> Callable[[Sequence[int], Sequence[int]], None]:
        mlperf_loadgen = library()
        complete, response = mlperf_loadgen.QuerySamplesComplete, mlperf_loadgen.QuerySampleResponse
        clock, record = time.perf_counter_ns, self.latencies.append

        def issue(query_ids: Sequence[int], sample_indices: Sequence[int]) -> None:
            """One query: run, tell LoadGen, then (off the clock) look for NaN."""
            if self.failure is not None:
                complete([response(query_ids[0], 0, 0)])
                return
            index = sample_indices[0]
            completed = False
            try:
                inputs = samples[index]
                self.interruptible = True
                start = clock()
                outputs = runner(*inputs)
                end = clock()
                self.interruptible = False
                buffer = np.ascontiguousarray(outputs[0])  # LoadGen gets its address, so it lives until completion
                complete([response(query_ids[0], buffer.ctypes.data, buffer.nbytes)])
                completed = True
                record(end - start)
                if not all(np.isfinite(output).all() for output in outputs):
                    self.nonfinite += 1
            except BaseException as error:
                self.interruptible = False
                self.failure, self.failed_sample = error, index
                if not completed:
                    complete([response(query_ids[0], 0, 0)])

        return issue

    def flush(self) -> None:
        """Every query was answered when it was issued."""

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """A signal: raise where :meth:`issue` catches it, else only leave a note, for LoadGen would not survive it."""
        if self.interruptible:
            self.interruptible = False
            raise KeyboardInterrupt(signum)
        self.failure = self.failure or KeyboardInterrupt(signum)

    def raise_failure(self, queries: int) -> None:
        if self.failure is None:
            return
        if not isinstance(self.failure, Exception):
            raise self.failure
        raise MeasurementError(
            f"'{self.name}' failed on sample {self.failed_sample} (query {len(self.latencies) + 1} of {queries}):"
            f" {type(self.failure).__name__}: {self.failure}"
        ) from self.failure


def library() -> Any:
    """The ``mlperf_loadgen`` module.

    Raises:
        MeasurementError: it is not installed; with the line that installs it.
    """
    try:
        import mlperf_loadgen
    except ImportError as error:
        raise MeasurementError(
            f"MLPerf LoadGen cannot be imported ({error})", "run: pip install mlcommons-loadgen"
        ) from error
    return mlperf_loadgen


class SystemUnderTest(Protocol):
    """What LoadGen calls back."""

    def issue(self, query_ids: Sequence[int], sample_indices: Sequence[int]) -> None:
        """A query of one sample or more; each is answered by ``QuerySamplesComplete``, now or later. May not raise."""

    def flush(self) -> None:
        """No more queries come. May not raise."""

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """SIGINT arrived while Python code ran."""


def start_test(sut: SystemUnderTest, settings: Any, samples: int, folder: Path) -> None:
    """Run a test of LoadGen's over ``samples`` samples that are in memory; its logs are in ``folder`` afterwards.

    One at a time: another thread's waits, as LoadGen has one logger and ends the process if that is started twice.
    """
    mlperf_loadgen = library()
    logs = mlperf_loadgen.LogSettings()
    logs.log_output.outdir = str(folder)
    logs.log_output.copy_summary_to_stdout = False
    logs.enable_trace = False
    system = mlperf_loadgen.ConstructFastSUT(sut.issue, sut.flush)
    queries = mlperf_loadgen.ConstructQSL(samples, samples, _nothing, _nothing)
    try:
        with _ONE_AT_A_TIME, _deferred_interrupt(sut):
            # By default LoadGen reads audit.config from the working directory, whoever put it there.
            mlperf_loadgen.StartTestWithLogSettings(system, queries, settings, logs, str(folder / "audit.config"))
    finally:
        mlperf_loadgen.DestroyQSL(queries)
        mlperf_loadgen.DestroyFastSUT(system)


def _single_stream_settings(queries: int) -> Any:
    mlperf_loadgen = library()
    settings = mlperf_loadgen.TestSettings()
    settings.scenario = mlperf_loadgen.TestScenario.SingleStream
    settings.mode = mlperf_loadgen.TestMode.PerformanceOnly
    settings.min_query_count = settings.max_query_count = queries
    settings.min_duration_ms = 0
    return settings


def _nothing(*arguments: object) -> None:
    """LoadGen's load and unload callbacks: the samples are in memory already."""


@contextmanager
def _deferred_interrupt(sut: SystemUnderTest) -> Iterator[None]:
    """Take signals away from Python handlers, which could raise on the threshold of a C++ callback."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in handlers:
        signal.signal(number, sut.interrupt)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def log_files(keep: Path | None) -> Iterator[Path]:
    """The folder for LoadGen's logs: ``keep``, or one that goes afterwards."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="optc-loadgen-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    try:
        keep.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MeasurementError(f"cannot write LoadGen's logs to {keep}: {error.strerror}") from error
    yield keep
