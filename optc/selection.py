"""Which of several runtimes a program is kept in: lowered to each in question, measured, one kept."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from optc.bench import choice_cache
from optc.bench.baselines import baselines
from optc.bench.choice import Outcome, choose
from optc.bench.measure import measure as measure_candidates
from optc.bench.results import Candidate, Measurement
from optc.evaluation import evaluation_mode
from optc.lowering.backend import Backend
from optc.lowering.lowering import Lowering, lower_all
from optc.program import Program
from optc.progress import Run
from optc.target import Target

OPTIMIZED = "optc"
"""What the optimized model is called among the measured candidates."""


class TemporaryFolder:
    """A folder that is removed with the object, or at exit."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="optc-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@dataclass(frozen=True)
class Selection:
    """The lowering that was kept, what became of each backend, what was measured, lines for the user."""

    kept: Lowering
    outcomes: tuple[Outcome, ...]
    measurement: Measurement | None
    notes: tuple[str, ...]
    folder: TemporaryFolder


def select(
    run: Run,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    program: Program,
    chosen: list[Backend],
    refused: Mapping[str, str],
    target: Target,
    several: bool,
    measure: bool,
) -> Selection:
    """Lower to every backend in question, measure, keep one."""
    remembered = choice_cache.file_of(program, target, chosen) if several and len(chosen) > 1 else None
    known = choice_cache.recall(remembered) if remembered else None
    if known:
        chosen = [each for each in chosen if each.name == known.outcomes[0].backend]
    folder = TemporaryFolder()
    with run.step(f"Lowering to {', '.join(each.name for each in chosen)}") as step:
        lowerings, failed = lower_all(chosen, program, target, folder.path, step.update)
        step.done("; ".join(f"{made.provider}, {made.precision}" for made in lowerings))
    names = {f"{OPTIMIZED} {made.backend.name}" if several else OPTIMIZED: made for made in lowerings}
    measurement = _measure(run, model, inputs, names, target, measure) if measure or len(names) > 1 else None
    kept, outcomes, notes = lowerings[0], tuple[Outcome, ...](), tuple[str, ...]()
    if known:
        outcomes = known.outcomes
        notes = (f"backend chosen by the measurement of {known.measured}; to measure again, delete {remembered}",)
    elif several:
        kept, outcomes = choose(names, {**refused, **failed}, measurement)
        if remembered and measurement is not None:
            choice_cache.remember(remembered, outcomes)
    for made in lowerings:
        if made is not kept:
            shutil.rmtree(made.folder)
    return Selection(kept, outcomes, measurement, notes, folder)


def _measure(
    run: Run,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    lowerings: Mapping[str, Lowering],
    target: Target,
    with_baselines: bool,
) -> Measurement:
    """Latency of what was lowered and, if wanted, of the device's baselines, in turns."""
    query = tuple(tensor[: target.batch].contiguous() for tensor in inputs)
    candidates = baselines(model, query, target) if with_baselines else []
    for name, made in lowerings.items():
        quantized = "int8" in made.precision or "int4" in made.precision
        candidates.append(Candidate(name, made.precision, quantized, made.load, made.bytes))
    arrays = [tuple(tensor.numpy() for tensor in query)]
    with run.step("Measuring with MLPerf LoadGen") as step, evaluation_mode(model):
        measurement = measure_candidates(candidates, arrays, target, optimized=tuple(lowerings), progress=step.update)
        step.done(", ".join(result.name for result in measurement.results if result.error is None))
    return measurement
