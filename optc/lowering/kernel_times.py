"""How long each operator of a runtime took, as the runtime's own profiler tells."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

WARM_UP = 2
"""First calls that are left out of account."""
SECONDS = 0.5
MOST_CALLS = 200


@dataclass(frozen=True)
class KernelTime:
    """An operator of a runtime, which may do the work of several nodes of the graph.

    Attributes:
        name: its name in the runtime.
        operator: what the runtime calls what it runs, such as ``"QLinearConv"`` or ``"brgconv_avx512_I8"``.
        seconds: median over the profiled queries.
        kind: what it computes in, as ``"float32"``, ``"int8"``, …; empty where it does not compute.
        nodes: the names, in the runtime's file, of what it was made from. ``details["origins"]`` of the lowering, where
            there is one, tells the names in the graph; without, they are the graph's own.
    """

    name: str
    operator: str
    seconds: float
    kind: str = ""
    nodes: tuple[str, ...] = ()


def repeat_query(call: Callable[[], object]) -> int:
    """Call for about half a second after warming up, at least three times; returns how often in all."""
    for _ in range(WARM_UP):
        call()
    calls, start = 0, time.perf_counter()
    while calls < 3 or (calls < MOST_CALLS and time.perf_counter() - start < SECONDS):
        call()
        calls += 1
    return calls + WARM_UP


def medians(events: Iterable[tuple[Hashable, float]], calls: int) -> dict[Hashable, float]:
    """The median time of a query by key, from events in order of time; the first :data:`WARM_UP` are left out.

    Args:
        events: key and time, one for each run of an operator; a key may run several times in a query.
        calls: how many queries ran, those for warming up included.
    """
    found: dict[Hashable, list[float]] = defaultdict(list)
    for key, taken in events:
        found[key].append(taken)
    result = {}
    for key, times in found.items():
        each = max(1, len(times) // calls)
        queries = [sum(times[start : start + each]) for start in range(0, len(times), each)]
        result[key] = statistics.median(queries[WARM_UP:] or queries)
    return result
