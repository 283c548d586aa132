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
    divided in blocks of rows, and those of few rows, as a ViT's 197, do not share out evenly. Both are compiled and run
    in turns, as the target runs them.

    Raises:
        BackendError: OpenVINO cannot compile or run it.
    """
    start = time.perf_counter()
    own, seconds = _trial(model, target, given)
    other: Partitioner = "static" if own == "AUTO" else "auto"
    changed = given.model_copy(update={"partitioner": other})
    ratios = [_trial(model, target, changed)[1] / seconds]
    while ratios[-1] < 1.0 and len(ratios) < _ROUNDS and time.perf_counter() - start < _SECONDS:
        order = (given, changed) if len(ratios) % 2 == 0 else (changed, given)
        taken = {options.partitioner: _trial(model, target, options)[1] for options in order}
        ratios.append(taken[other] / taken[given.partitioner])
    return other if max(ratios) < 1.0 and statistics.median(ratios) <= _WORTHWHILE else None


def _trial(model: ov.Model, target: Target, given: OpenVinoOptions) -> tuple[str, float]:
    """OpenVINO's partitioner with these options, and the median time of a query after one that does not count."""
    compiled, requests = compile_and_fill(model, target, given)
    run_side_by_side(requests)
    taken: list[float] = []
    while not taken or sum(taken) < _ROUND_SECONDS:
        start = time.perf_counter()
        run_side_by_side(requests)
        taken.append(time.perf_counter() - start)
    return str(compiled.get_property(PARTITIONER)).rpartition(".")[2], statistics.median(taken)
