"""Quick latencies of small programs on one backend, to choose by; for claims there is :mod:`optc.bench.measure`."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from optc.batches import at_batch
from optc.lowering.agreement import as_array
from optc.lowering.backend import Array, Backend, Runner
from optc.lowering.lowering import kept
from optc.program import Program, complete_meta
from optc.target import Target

ROUNDS = 8
HOPELESS = 2.0
"""How many times the fastest program's latency another may have in the first round to be measured again."""
CLOSE = 1.2
"""How many times the fastest program's latency another may have after all rounds to be measured further."""
_ROUND_SECONDS = 0.01


def latencies(programs: Sequence[Program], backend: Backend, target: Target, seconds: float = 0.0) -> list[float]:
    """Seconds of a query on each program's example inputs: the least of several rounds' medians, taken in turns.

    A program that takes over :data:`HOPELESS` times the fastest one's in the first round has that round alone. The
    others are opened anew after half of the rounds: how a model happens to lie in memory changes its latency. Those
    :data:`CLOSE` to the fastest go on like that for the ``seconds``: a machine may be slow for longer than the rounds
    take.

    Where the batch may vary, a query has the target's. The program is lowered as it is all the same: runtimes fuse
    otherwise where they know the batch. Nodes without ``meta["val"]``, as passes leave them while they work, get it.

    Other load only ever adds to a latency, so the least round is the closest to its own. NaN for a program that the
    backend cannot lower or run.
    """
    with tempfile.TemporaryDirectory(prefix="optc-latency-") as folder, ExitStack() as stack:
        rivals: dict[int, Callable[[], Runner]] = {}
        failed: dict[str, str] = {}
        for index, program in enumerate(programs):
            complete_meta(program)
            with kept(failed, backend.name, backend.origin, key=str(index)):
                rivals[index] = _lowered(backend, program, target, Path(folder, str(index)))
        found = [math.inf if index in rivals else math.nan for index in range(len(programs))]
        number, end = 0, math.inf
        while number < ROUNDS or (len(rivals) > 1 and time.perf_counter() < end):
            if number % (ROUNDS // 2) == 0:
                stack.close()
                runners: dict[int, Runner] = {}
            for index, load in rivals.items():
                with kept(failed, backend.name, backend.origin, key=str(index)):
                    if index not in runners:
                        runners[index] = stack.enter_context(closing(load()))
                    found[index] = min(found[index], _median(runners[index], _query(programs[index], target)))
                if str(index) in failed:
                    found[index] = math.nan
            number += 1
            if number == ROUNDS:
                end = time.perf_counter() + seconds
            least = min((found[index] for index in rivals if not math.isnan(found[index])), default=0.0)
            limit = (HOPELESS if number < ROUNDS else CLOSE) * least
            rivals = {index: load for index, load in rivals.items() if found[index] <= limit}
        return found


def _lowered(backend: Backend, program: Program, target: Target, folder: Path) -> Callable[[], Runner]:
    """What opens the program on the backend anew at each call."""
    folder.mkdir()
    return partial(backend.load, folder, backend.lower(program, target, folder).files, target)


def _query(program: Program, target: Target) -> list[Array]:
    return [as_array(tensor) for tensor in at_batch(program.example_inputs, program, target.batch)]


def _median(runner: Runner, inputs: list[Array]) -> float:
    runner(*inputs)
    taken: list[float] = []
    while sum(taken) < _ROUND_SECONDS or len(taken) < 3:
        start = time.perf_counter()
        runner(*inputs)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
