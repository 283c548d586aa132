"""How long each of Inductor's kernels takes: from PyTorch's profiler, which the compiled code opens ranges for."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.autograd import profiler

from optc.lowering.kernel_times import KernelTime, medians, repeat_query

_GRAPH = re.compile(r"^graph_\d+_")
_LIBRARY = re.compile(r"^aoti_torch_(cpu|cuda)_+(mkldnn_+)?")


def kernel_times(call: Callable[[], object], kernels: Sequence[Mapping[str, Any]]) -> list[KernelTime]:
    """Repeat a query under PyTorch's profiler.

    Args:
        call: runs one query.
        kernels: what the package says of its kernels, in the order that they run in.

    A kernel that runs several times in a query is told apart by the order of its runs, where they are as many as the
    package says; else its runs count together, for all of their nodes.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the recorder writes to the terminal when it starts and stops
    with profiler.profile(use_kineto=True, acc_events=True) as recorded:
        calls = repeat_query(call)
    entries: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for kernel in kernels:
        entries[kernel["name"]].append(kernel)
    ranges = [
        (_GRAPH.sub("", event.name), event.cpu_time / 1e6)
        for event in sorted(recorded.function_events or (), key=lambda event: event.time_range.start)
        if event.cpu_parent is None
    ]
    runs = Counter(name for name, _ in ranges)
    seen: Counter[str] = Counter()
    events = []
    for name, seconds in ranges:
        each = runs[name] // calls
        if each:  # what runs more rarely belongs to no query
            events.append(((name, seen[name] % each if each == len(entries[name]) else 0), seconds))
            seen[name] += 1
    times = medians(events, calls)
    found = []
    for name, turn in dict.fromkeys(key for key, _ in events):
        mine = entries[name]
        told_apart = len(mine) == runs[name] // calls
        made_of = [mine[turn]] if told_apart else mine
        nodes = tuple(dict.fromkeys(node for kernel in made_of for node in kernel["nodes"]))
        kind = made_of[0]["kind"] if made_of else ""
        operator = _LIBRARY.sub("", name)
        found.append(
            KernelTime(f"{operator}:{turn}" if told_apart else operator, operator, times[name, turn], kind, nodes)
        )
    return found
