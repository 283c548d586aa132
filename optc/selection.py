"""Which of several runtimes, and lists of passes, a model is kept in: each lowered, all measured, one kept."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from optc.bench import choice_cache
from optc.bench.baselines import baselines
from optc.bench.choice import Outcome, choose
from optc.bench.measure import measure as measure_candidates
from optc.bench.results import Candidate, Measurement
from optc.errors import BackendError
from optc.evaluation import evaluation_mode
from optc.lowering.backend import Array, Backend
from optc.lowering.lowering import Lowering, has_own_process, lower_all
from optc.passmanager.alternatives import SEPARATOR, Made
from optc.program import Program
from optc.progress import Run
from optc.report.account import is_account
from optc.target import Target

OPTIMIZED = "optc"
"""What the optimized model is called among the measured candidates."""
WORTHWHILE = 2.0
"""How many times the fastest backend's latency the first list of passes may take on one that others are tried on."""
LOOK_BLOCKS, LOOK_SECONDS = 2, 0.1
"""How long the first look at each backend is."""


class TemporaryFolder:
    """A folder that is removed with the object, or at exit."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="optc-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


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

    Where there are several of both, all backends get the first program, and the others only those on which it took
    at most :data:`WORTHWHILE` times what it took on the fastest one. A backend that compiles for seconds is left
    out for a program that takes longer than that on all others.

    Args:
        made: programs by the lists of passes that made them, and the lists that came to nothing.
        refused: backends that cannot run here, with the reason.
        automatic: whether nobody asked for a backend in particular.

    Raises:
        BackendError: no backend takes any program, or all failed when measured.
    """
    programs = made.programs
    remembered = None
    if (automatic and len(chosen) > 1) or len(programs) > 1:
        remembered = choice_cache.file_of(programs, target, chosen)
    known = choice_cache.recall(remembered) if remembered else None
    if known:
        first = known.outcomes[0]
        chosen, programs = (
            [each for each in chosen if each.name == first.backend],
            {first.passes: programs[first.passes]},
        )
    contest = _Contest(run, inputs, target, TemporaryFolder())
    contest.enter(programs, chosen)
    names = contest.names(several=automatic)
    measurement = _measure(run, model, inputs, names, target, measure) if measure or len(names) > 1 else None
    kept, outcomes, notes = next(iter(names.values())), tuple[Outcome, ...](), tuple[str, ...]()
    if known:
        outcomes = known.outcomes
        notes = (f"chosen by the measurement of {known.measured}; to measure again, delete {remembered}",)
    elif automatic or len(made.programs) + len(made.dropped) > 1:
        left = [
            *contest.left,
            *(Outcome(backend, False, reason) for backend, reason in refused.items()),
            *(Outcome("", False, reason, passes=passes) for passes, reason in made.dropped.items()),
        ]
        kept, outcomes = choose(names, left, measurement)
        if remembered and measurement is not None:
            choice_cache.remember(remembered, outcomes)
    for each in contest.lowerings:
        if each is not kept:
            shutil.rmtree(each.folder)
    return Selection(kept, outcomes, measurement, notes, contest.folder)


class _Contest:
    """Lowers programs to backends, those that cannot win left out.

    Attributes:
        lowerings: what came of it.
        left: what was not lowered, with the reason.
    """

    def __init__(self, run: Run, inputs: tuple[Tensor, ...], target: Target, folder: TemporaryFolder) -> None:
        self.folder = folder
        self.lowerings: list[Lowering] = []
        self.left: list[Outcome] = []
        self._best: Lowering | None = None
        self._run, self._inputs, self._target = run, inputs, target

    def enter(self, programs: Mapping[str, Program], chosen: Sequence[Backend]) -> None:
        """Lower the programs.

        Raises:
            BackendError: no backend takes any of them.
        """
        failure: BackendError | None = None
        for number, (passes, program) in enumerate(programs.items()):
            folder = self.folder.path / str(number)
            folder.mkdir()
            apt = self._apt(passes, program, chosen) if len(programs) > 1 else chosen
            names = ", ".join(each.name for each in apt)
            try:
                with self._run.step(f"Lowering {passes} to {names}" if passes else f"Lowering to {names}") as step:
                    lowered, refused = lower_all(
                        list(apt), program, self._target, folder, step.update, partial(self._hopeless, passes)
                    )
                    step.done("; ".join(f"{each.provider}, {each.precision}" for each in lowered))
            except BackendError as error:
                failure = failure or error
                self.left += [Outcome(each.name, False, str(error), passes=passes) for each in apt]
                continue
            self.lowerings += [replace(each, passes=passes) for each in lowered]
            self.left += [Outcome(name, False, reason, passes=passes) for name, reason in refused.items()]
            if len(programs) > 1 and len(lowered) == len(self.lowerings) and len(chosen) > 1:
                chosen = self._worthwhile(chosen, [each for each in programs if each != passes])
        if not self.lowerings and failure is not None:
            raise failure

    def _apt(self, passes: str, program: Program, chosen: Sequence[Backend]) -> Sequence[Backend]:
        """Not those that compile for seconds if the program's formats are those that were fastest on others."""
        accounts = [record.notes.get("account") for record in program.history]
        measured = {row["backend"] for rows in accounts if is_account(rows) for row in rows or ()} - {""}
        apt = [each for each in chosen if each.name in measured or not has_own_process(each)]
        if not measured or not apt:
            return chosen
        reason = f"not tried: each layer's format is the fastest on {', '.join(sorted(measured))}"
        self.left += [Outcome(each.name, False, reason, passes=passes) for each in chosen if each not in apt]
        return apt

    def _worthwhile(self, chosen: Sequence[Backend], others: Sequence[str]) -> list[Backend]:
        """The backends that other programs are worth lowering to, by a first look at what each made of this one."""
        with self._run.step("Comparing the backends") as step:
            p50 = self._look(self.lowerings, step.update)
            best = min(p50, default=0.0)
            looked_at = {each.backend.name: taken for each, taken in zip(self.lowerings, p50, strict=True)}
            worthwhile = [each for each in chosen if looked_at.get(each.name, 0.0) <= WORTHWHILE * best]
            step.done(f"{', '.join(others)} on {', '.join(each.name for each in worthwhile)}")
        self._best = self.lowerings[p50.index(best)]
        first, rest = self._best.passes, SEPARATOR.join(others)
        for each in chosen:
            if each not in worthwhile:
                times = f"{looked_at[each.name] / best:.1f} times the latency that it has on the fastest backend"
                self.left.append(Outcome(each.name, False, f"not tried: {first} has {times}", passes=rest))
        return worthwhile

    def _hopeless(self, passes: str, lowered: list[Lowering]) -> str:
        """Why a program need not be compiled for seconds: what it takes on the backends that were quick to lower to."""
        if self._best is None:
            return ""
        *own, best = self._look([*lowered, self._best], lambda text: None)
        if min(own) <= WORTHWHILE * best:
            return ""
        times = f"{min(own) / best:.1f} times the latency of {self._best.passes} on {self._best.backend.name}"
        return f"not tried: {passes} has {times} already on {lowered[own.index(min(own))].backend.name}"

    def _look(self, lowerings: Sequence[Lowering], progress: Callable[[str], None]) -> list[float]:
        """Nanoseconds that each takes, by a short measurement; infinite for what fails."""
        candidates = [_candidate(str(number), each) for number, each in enumerate(lowerings)]
        query = [_arrays(_query(self._inputs, self._target))]
        found = measure_candidates(
            candidates, query, self._target, blocks=LOOK_BLOCKS, block_seconds=LOOK_SECONDS, progress=progress
        )
        return [
            each.percentiles.p50_ns if each.percentiles and not each.error else math.inf
            for each in (found[candidate.name] for candidate in candidates)
        ]

    def names(self, several: bool) -> dict[str, Lowering]:
        """The lowerings by the names that they are measured under.

        Args:
            several: whether a single one is called by its backend, too.
        """

        def name(each: Lowering) -> str:
            backend = each.backend.name if several else ""
            return " ".join(filter(None, (OPTIMIZED, backend, each.passes)))

        return {name(each): each for each in self.lowerings}


def _query(inputs: tuple[Tensor, ...], target: Target) -> tuple[Tensor, ...]:
    return tuple(tensor[: target.batch].contiguous() for tensor in inputs)


def _arrays(query: tuple[Tensor, ...]) -> tuple[Array, ...]:
    return tuple(tensor.detach().cpu().numpy() for tensor in query)


def _candidate(name: str, made: Lowering) -> Candidate:
    quantized = "int8" in made.precision or "int4" in made.precision
    return Candidate(name, made.precision, quantized, made.load, made.bytes)


def _measure(
    run: Run,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    lowerings: Mapping[str, Lowering],
    target: Target,
    with_baselines: bool,
) -> Measurement:
    """Latency of what was lowered and, if wanted, of the device's baselines, in turns."""
    query = _query(inputs, target)
    candidates = baselines(model, query, target) if with_baselines else []
    candidates += [_candidate(name, made) for name, made in lowerings.items()]
    arrays = [_arrays(query)]
    with run.step("Measuring with MLPerf LoadGen") as step, evaluation_mode(model):
        measurement = measure_candidates(candidates, arrays, target, optimized=tuple(lowerings), progress=step.update)
        step.done(", ".join(result.name for result in measurement.results if result.error is None))
    return measurement
