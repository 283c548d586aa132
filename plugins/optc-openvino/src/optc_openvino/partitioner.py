"""How OpenVINO divides an operator's work among threads: the way that it did not choose, where that is faster."""

from __future__ import annotations

import statistics
import time
from typing import Literal

from optc import Target
from optc_openvino.parts import compile_and_fill, run_side_by_side
from optc_openvino.runtime import PARTITIONER, OpenVinoOptions, ov

Partitioner = Literal["static", "auto"]
_ROUNDS, _ROUND_SECONDS, _SECONDS = 3, 0.3, 8.0
"""How often each is compiled and run at most, how long each time, and after how long no other round begins."""
_WORTHWHILE = 0.97
"""Of the time of OpenVINO's own choice, what the other may take at most; and it has to be faster every time."""


def faster_partitioner(model: ov.Model, target: Target, given: OpenVinoOptions) -> Partitioner | None:
    """The partitioner that OpenVINO does not choose by itself, if a query takes less time with it.

    OpenVINO goes by rules for a model as a whole. Equal parts for all threads cost least to hand out, but a layer is
    divided in blocks: the 197 rows of a ViT's make four blocks of up to 64, and of two threads one gets 128 rows.
    Compiled and run in turns, as the target runs it.

    Raises:
        BackendError: OpenVINO cannot compile or run it.
    """
    compiled, _ = compile_and_fill(model, target, given)
    own = str(compiled.get_property(PARTITIONER)).rpartition(".")[2]
    del compiled
    other: Partitioner = "static" if own == "AUTO" else "auto"
    trials = (given, given.model_copy(update={"partitioner": other}))
    ratios: list[float] = []
    start = time.perf_counter()
    while len(ratios) < _ROUNDS and (not ratios or time.perf_counter() - start < _SECONDS):
        order = trials if len(ratios) % 2 == 0 else trials[::-1]
        taken = {options.partitioner: _seconds(model, target, options) for options in order}
        ratios.append(taken[other] / taken[given.partitioner])
        if ratios[-1] >= 1.0:
            return None
    return other if statistics.median(ratios) <= _WORTHWHILE else None


def _seconds(model: ov.Model, target: Target, given: OpenVinoOptions) -> float:
    """What a query takes: the median, after one that does not count."""
    compiled, requests = compile_and_fill(model, target, given)
    run_side_by_side(requests)
    taken: list[float] = []
    while not taken or sum(taken) < _ROUND_SECONDS:
        start = time.perf_counter()
        run_side_by_side(requests)
        taken.append(time.perf_counter() - start)
    del compiled
    return statistics.median(taken)
