"""Systems under test for LoadGen's scenarios besides the quick SingleStream one: batches, and a server with a queue.

What LoadGen calls back comes from C++, so no exception may leave it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import numpy as np
import torch

from optc.bench.loadgen import library
from optc.errors import MeasurementError
from optc.lowering.backend import Array, Runner

Samples = Sequence[tuple[Array, ...]]


class _Base:
    """Runs samples in batches and keeps the first failure.

    Attributes:
        latencies_ns: one per batch that was run, or as the subclass says.
        nonfinite: batches whose outputs held a NaN or an infinity.
    """

    def __init__(self, runner: Runner, samples: Samples, name: str, batch: int, *, classes: bool) -> None:
        """
        Args:
            batch: how many samples are run at once.
            classes: answer with the class of the largest score, as float32, which LoadGen logs in accuracy mode.
        """
        self.name = name
        self.latencies_ns: list[int] = []
        self.nonfinite = 0
        self.failure: BaseException | None = None
        self.failed_samples: tuple[int, ...] = ()
        self._runner, self._samples, self._batch, self._classes = runner, samples, batch, classes
        loadgen = library()
        self._complete: Callable[[list[Any]], None] = loadgen.QuerySamplesComplete
        self._response: Callable[[int, int, int], Any] = loadgen.QuerySampleResponse

    def run(self, indices: Sequence[int]) -> tuple[Array, ...]:
        """The outputs for some samples, put into one batch. A short one is filled up: code that is compiled for a batch
        size would be compiled anew for it, within the run.
        """
        if self._batch == 1:
            return self._runner(*self._samples[indices[0]])
        filled = [*indices, *[indices[-1]] * (self._batch - len(indices))]
        outputs = self._runner(*map(np.concatenate, zip(*(self._samples[index] for index in filled), strict=True)))
        return outputs if len(filled) == len(indices) else tuple(output[: len(indices)] for output in outputs)

    def answer(self, ids: Sequence[int], outputs: tuple[Array, ...] | None) -> None:
        """Tell LoadGen that samples are done; without outputs, that they came to nothing."""
        if outputs is None or not self._classes:
            self._complete([self._response(query, 0, 0) for query in ids])
            return
        scores = outputs[0].reshape(len(ids), -1)
        found = np.where(np.isnan(scores).any(1), -1, scores.argmax(1)).astype(np.float32)
        address = found.ctypes.data  # LoadGen copies from it before this returns
        self._complete([self._response(query, address + 4 * row, 4) for row, query in enumerate(ids)])

    def fail(self, error: BaseException, indices: Sequence[int]) -> None:
        if self.failure is None:
            self.failure, self.failed_samples = error, tuple(indices)

    def look(self, outputs: tuple[Array, ...]) -> None:
        """Off the clock: count outputs that are no numbers."""
        if not all(np.isfinite(output).all() for output in outputs):
            self.nonfinite += 1

    def close(self) -> None:
        """Free what the system holds; called once LoadGen has returned."""

    def raise_failure(self) -> None:
        """Raise what went wrong, if anything did.

        Raises:
            MeasurementError: the runner raised; names the samples.
            KeyboardInterrupt: SIGINT arrived.
        """
        if self.failure is None:
            return
        if not isinstance(self.failure, Exception):
            raise self.failure
        which = ", ".join(map(str, self.failed_samples[:8])) + (" …" if len(self.failed_samples) > 8 else "")
        what = "sample" if len(self.failed_samples) == 1 else "samples"
        raise MeasurementError(
            f"'{self.name}' failed on {what} {which} (after {len(self.latencies_ns)} that went well):"
            f" {type(self.failure).__name__}: {self.failure}"
        ) from self.failure


class BatchSystem(_Base):
    """Answers a query of any number of samples at once, ``batch`` at a time: SingleStream, MultiStream, Offline."""

    def __init__(self, runner: Runner, samples: Samples, name: str, batch: int, *, classes: bool = False) -> None:
        super().__init__(runner, samples, name, batch, classes=classes)
        self._interruptible = False

    def issue(self, query_ids: Sequence[int], sample_indices: Sequence[int]) -> None:
        """Run the query's samples, batch after batch; after a failure answer at once, so that the run ends."""
        done = 0
        try:
            while done < len(query_ids) and self.failure is None:
                ids, indices = query_ids[done : done + self._batch], sample_indices[done : done + self._batch]
                try:
                    self._interruptible = True
                    start = time.perf_counter_ns()
                    outputs = self.run(indices)
                    end = time.perf_counter_ns()
                    self._interruptible = False
                    self.answer(ids, outputs)
                    done += len(ids)
                    self.latencies_ns.append(end - start)
                    self.look(outputs)
                except BaseException as error:
                    self._interruptible = False
                    self.fail(error, indices)
        finally:
            if done < len(query_ids):
                self.answer(query_ids[done:], None)

    def flush(self) -> None:
        """Every query was answered when it was issued."""

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """A signal: raise where :meth:`issue` catches it, else only leave a note, for LoadGen would not survive it."""
        if self._interruptible:
            self._interruptible = False
            raise KeyboardInterrupt(signum)
        self.fail(KeyboardInterrupt(signum), ())


class QueueSystem(_Base):
    """Queues what arrives and answers it from as many threads as the runner computes calls at a time: Server, Offline.

    ``latencies_ns`` include the waiting.

    After a failure nothing is answered any more until LoadGen has stopped issuing, which it does when too many queries
    are outstanding; the schedule would otherwise go on to its end.
    """

    def __init__(self, runner: Runner, samples: Samples, name: str, threads: int, batch: int = 1) -> None:
        """``batch``: how many of the samples that arrive together are run at once."""
        super().__init__(runner, samples, name, batch, classes=False)
        self._threads = threads
        self._arrived: queue.SimpleQueue[tuple[Sequence[int], Sequence[int], int] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._outstanding: set[int] = set()
        self._ended = False
        self._workers = [threading.Thread(target=self._serve, daemon=True) for _ in range(runner.concurrency)]
        for worker in self._workers:
            worker.start()

    def issue(self, query_ids: Sequence[int], sample_indices: Sequence[int]) -> None:
        """Queue what arrived."""
        now = time.perf_counter_ns()
        with self._lock:
            self._outstanding.update(query_ids)
        for start in range(0, len(query_ids), self._batch):
            part = slice(start, start + self._batch)
            self._arrived.put((query_ids[part], sample_indices[part], now))

    def flush(self) -> None:
        """LoadGen has stopped issuing: what a failure left outstanding can be let go."""
        with self._lock:
            self._ended = True
        if self.failure is not None:
            self._let_go()

    def interrupt(self, signum: int, frame: FrameType | None) -> None:
        """A signal: leave a note, for LoadGen would not survive an exception."""
        self.fail(KeyboardInterrupt(signum), ())

    def close(self) -> None:
        """End the threads; called once LoadGen has returned."""
        for _ in self._workers:
            self._arrived.put(None)
        for worker in self._workers:
            worker.join()

    def _serve(self) -> None:
        torch.set_num_threads(self._threads)
        while (arrival := self._arrived.get()) is not None:
            queries, indices, since = arrival
            if self.failure is None:
                try:
                    outputs = self.run(indices)
                    self._answer_once(queries, outputs)
                    self.latencies_ns.append(time.perf_counter_ns() - since)
                    self.look(outputs)
                except BaseException as error:
                    self.fail(error, indices)
            if self.failure is not None and self._ended:
                self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            left = list(self._outstanding)
        self._answer_once(left, None)

    def _answer_once(self, ids: Sequence[int], outputs: tuple[Array, ...] | None) -> None:
        with self._lock:
            mine = [query for query in ids if query in self._outstanding]
            self._outstanding.difference_update(mine)
        if mine:
            self.answer(mine, outputs)
