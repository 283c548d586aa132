"""Which of several runtimes, and lists of passes, a model is kept in: each lowered, all measured, one kept."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from optc.bench import choice_cache
from optc.bench.baselines import baselines
from optc.bench.choice import Outcome, choose
from optc.bench.disturbance import by_others
from optc.bench.measure import measure as measure_candidates
from optc.bench.results import Measurement
from optc.contest import Contest, TemporaryFolder, arrays, candidates, measured_on
from optc.errors import OptcError
from optc.evaluation import evaluation_mode
from optc.lowering.backend import Backend
from optc.lowering.lowering import Lowering, Passing
from optc.lowering.variants import offers_variants
from optc.passmanager.alternatives import Made
from optc.program import Program
from optc.progress import Run
from optc.target import Target


@dataclass(frozen=True)
class Selection:
    """The lowering that was kept, what became of each other, what was measured, lines for the user."""

    kept: Lowering
    outcomes: tuple[Outcome, ...]
    measurement: Measurement | None
    notes: tuple[str, ...]
    folder: TemporaryFolder


def select(
    run: Run,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    made: Made,
    chosen: list[Backend],
    refused: Mapping[str, str],
    target: Target,
    automatic: bool,
    measure: bool,
) -> Selection:
    """Lower every program to every backend in question, measure, keep one.

    Where there are several of both, those are left out that cannot win: :mod:`optc.contest`. The ways that a backend
    offers to run what it wrote are measured where anything is.

    Args:
        inputs: one query's.
        made: programs by the lists of passes that made them, and the lists that came to nothing.
        refused: backends that cannot run here, with the reason.
        automatic: whether nobody asked for a backend in particular.

    Raises:
        BackendError: no backend takes any program, or all of several failed when measured.
    """
    programs = made.programs
    remembered = None
    with_variants = (automatic or measure or len(programs) > 1) and any(map(offers_variants, chosen))
    if (automatic and len(chosen) > 1) or len(programs) > 1 or with_variants:
        remembered = choice_cache.file_of(programs, target, chosen, _varying(made))

    def measured(contest: Contest) -> tuple[dict[str, Lowering], Measurement | None]:
        names = contest.names(several=automatic)
        return names, _measure(run, model, inputs, names, target, measure) if measure or len(names) > 1 else None

    known = choice_cache.recall(remembered) if remembered else None
    contest = _recalled(run, inputs, programs, chosen, target, known.outcomes[0]) if known else None
    if contest is not None:
        names, measurement = measured(contest)
        if failures := _failures(names, measurement):
            run.note(f"what was kept before failed when measured ({failures[0]}): everything is measured anew")
            contest = None
    if contest is None:
        known = None
        contest = Contest(run, inputs, target, with_variants)
        contest.enter(programs, chosen)
        names, measurement = measured(contest)
    kept, outcomes, notes = next(iter(names.values())), tuple[Outcome, ...](), tuple[str, ...]()
    several = automatic or bool(contest.left) or max(len(names), len(programs) + len(made.dropped)) > 1
    failed = bool(_failures(names, measurement))
    if known:
        outcomes = known.outcomes
        then = f", when {known.disturbed}" if known.disturbed else ""
        notes = (f"chosen by the measurement of {known.measured}{then}; to measure again, delete {remembered}",)
    elif several or not failed:  # what alone was asked for is kept even so, and the report has what failed
        left = [
            *contest.left,
            *(Outcome(backend, False, reason) for backend, reason in refused.items()),
            *(Outcome("", False, reason, passes=passes) for passes, reason in made.dropped.items()),
        ]
        kept, outcomes = choose(names, left, measurement)
        passing = any(isinstance(each.reason, Passing) for each in contest.left)
        if remembered and not failed and not passing:  # what failed may run another time
            seen = list(measurement.warnings) if measurement else []
            seen += [each for result in (measurement.results if measurement else ()) for each in result.warnings]
            choice_cache.remember(remembered, outcomes, by_others(seen))
    if not several and len(outcomes) == 1:
        outcomes = ()  # there was nothing to choose
    for folder in {each.folder for each in contest.lowerings} - {kept.folder}:
        shutil.rmtree(folder, ignore_errors=True)
    return Selection(kept, outcomes, measurement, notes, contest.folder)


def _varying(made: Made) -> dict[str, Any]:
    """What stands for programs whose formats were measured; for none where that are all."""
    found = {
        passes: [made.given, [(record.name, record.options) for record in program.history]]
        for passes, program in made.programs.items()
        if measured_on(program)
    }
    return found if len(found) < len(made.programs) else {}


def _failures(names: Iterable[str], measurement: Measurement | None) -> list[str]:
    """What went wrong with each lowering that failed when measured."""
    return [error for name in names if (error := measurement[name].error)] if measurement else []


def _recalled(
    run: Run,
    inputs: tuple[Tensor, ...],
    programs: Mapping[str, Program],
    chosen: list[Backend],
    target: Target,
    kept: Outcome,
) -> Contest | None:
    """What was kept before, lowered again; ``None`` where it cannot be, so that all are to be measured again."""
    target = target.with_options(kept.backend, kept.options) if kept.options else target
    contest = Contest(run, inputs, target)
    try:
        contest.enter({kept.passes: programs[kept.passes]}, [each for each in chosen if each.name == kept.backend])
    except (OptcError, LookupError) as error:
        run.note(f"what was kept before cannot be made again ({error}): everything is measured anew")
        return None
    return contest


def _measure(
    run: Run,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    lowerings: Mapping[str, Lowering],
    target: Target,
    with_baselines: bool,
) -> Measurement:
    """Latency of what was lowered and, if wanted, of the device's baselines, in turns."""
    measured = [*(baselines(model, inputs, target) if with_baselines else []), *candidates(lowerings)]
    with run.step("Measuring with MLPerf LoadGen") as step, evaluation_mode(model):
        measurement = measure_candidates(
            measured, [arrays(inputs)], target, optimized=tuple(lowerings), progress=step.update
        )
        step.done(", ".join(result.name for result in measurement.results if result.error is None))
    return measurement
