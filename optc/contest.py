"""Programs lowered to backends, those left out that cannot win."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from optc.bench.choice import Outcome
from optc.bench.measure import measure
from optc.bench.results import Candidate
from optc.errors import OptcError
from optc.lowering.agreement import as_array
from optc.lowering.backend import Array, Backend
from optc.lowering.lowering import Lowering, has_own_process, kept, lower_all, reason_of
from optc.lowering.variants import Refused, offers_variants, variants
from optc.options import options_text
from optc.passmanager.alternatives import SEPARATOR
from optc.program import Program
from optc.progress import Run
from optc.report.account import is_account
from optc.rewrite import is_quantized
from optc.target import Target

OPTIMIZED = "optc"
"""What the optimized model is called among the measured candidates."""
WORTHWHILE, WORTH_COMPILING = 2.0, 0.95
"""How many times the lowest latency so far a further program may be expected to take on a backend to be lowered to it,
and to one that compiles for half a minute: that has to promise a gain."""
WORTH_OTHER_OPTIONS = 1.25
"""How many times the lowest latency a lowering may take for the backend's other options to be tried on it."""
WORTH_THEM_TOO = 1.1
"""How many times the latency of a backend's fastest another of its lowerings may take for that: they gain alike."""
WORTH_ANOTHER_LOOK = 1.5
"""How many times the lowest latency a lowering may have taken when looked at to be looked at once more for that."""
LOOK_BLOCKS, LOOK_SECONDS = 2, 0.1
"""How long a look at a latency is."""


class TemporaryFolder:
    """A folder that is removed with the object, or at exit."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="optc-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class Contest:
    """Lowers programs to backends, those left out that cannot win.

    The first program goes to every backend, and each latency is looked at. A further one goes first to the fastest of
    those that take it; from what it takes there, what it would take on the others is told, roughly.

    Args:
        inputs: one query's.
        with_variants: whether what a backend wrote enters in each way that the backend offers to run it.

    Attributes:
        folder: where the files are.
        lowerings: what came of it.
        left: what was not lowered, with the reason.
    """

    def __init__(self, run: Run, inputs: tuple[Tensor, ...], target: Target, with_variants: bool = False) -> None:
        self.folder = TemporaryFolder()
        self.lowerings: list[Lowering] = []
        self.left: list[Outcome] = []
        self._run, self._inputs, self._target, self._with_variants = run, inputs, target, with_variants
        self._first: Mapping[str, float] = {}
        """Nanoseconds that the first program takes, by backend."""
        self._best: Lowering | None = None
        """The fastest that was looked at."""
        self._looked: dict[str, float] = {}
        """Nanoseconds that a lowering took at least when looked at, by its title: a disturbed look says nothing."""

    def enter(self, programs: Mapping[str, Program], chosen: Sequence[Backend]) -> None:
        """Lower the programs.

        Raises:
            OptcError: no backend takes any of them.
        """
        failure: OptcError | None = None
        for number, (passes, program) in enumerate(programs.items()):
            folder = self.folder.path / str(number)
            folder.mkdir()
            apt = self._apt(passes, program, chosen) if len(programs) > 1 else chosen
            failure = self._enter(passes, program, apt, folder) or failure
            if len(programs) > 1 and not self._first and len(chosen) > 1 and self.lowerings:
                chosen = self._worthwhile(chosen, [each for each in programs if each != passes])
        if not self.lowerings and failure is not None:
            raise failure
        self._leave_losers()
        if self._with_variants:
            for each in self._near_the_fastest():
                self._enter_variants(each, programs[each.passes])

    def _leave_losers(self) -> None:
        """Leave out what was far behind when looked at: measuring it takes longer than all others. Two are compared."""
        lowest = min(self._looked.values(), default=math.inf)
        behind = {title: taken / lowest for title, taken in self._looked.items() if math.isfinite(taken)}
        losers = [each for each in self.lowerings if behind.get(each.title, 1.0) > WORTHWHILE]
        for each in sorted(losers, key=lambda each: -behind[each.title])[: max(0, len(self.lowerings) - 2)]:
            reason = f"{behind[each.title]:.1f} times the lowest latency in a short look: not measured further"
            taken = self._looked[each.title] / 1e6
            outcome = Outcome(
                each.backend.name, False, reason, each.precision, taken, each.bytes, each.seconds, each.passes
            )
            self.left.append(outcome)
            self.lowerings.remove(each)
            shutil.rmtree(each.folder, ignore_errors=True)

    def _near_the_fastest(self) -> list[Lowering]:
        """What other options may make the fastest, of backends that offer any."""
        able = [each for each in self.lowerings if offers_variants(each.backend)]
        lowest = min(self._looked.values(), default=math.inf)
        able = [each for each in able if self._looked.get(each.title, 0.0) <= WORTH_ANOTHER_LOOK * lowest]
        leads = [each for each in ([self._best] if self._best else self.lowerings) if each not in able]
        if not able or len(able) + len(leads) == 1:
            return able
        with self._run.step("Looking for what other options are worth trying on") as step:
            p50 = self._look([*able, *leads], step.update)
            least: dict[str, float] = {}
            for each, taken in zip(able, p50, strict=False):
                least[each.backend.name] = min(taken, least.get(each.backend.name, math.inf))
            near = [
                each
                for each, taken in zip(able, p50, strict=False)
                if taken <= min(WORTH_OTHER_OPTIONS * min(p50), WORTH_THEM_TOO * least[each.backend.name])
            ]
            step.done(", ".join(each.title for each in near) or "nothing is near the fastest")
        return near

    def _enter_variants(self, made: Lowering, program: Program) -> None:
        found: list[Lowering] = []
        refused: Refused = []
        failed: dict[str, str] = {}
        with self._run.step(f"Running {made.title} with other options") as step:
            with kept(failed, made.backend.name, made.backend.origin, key=made.title):
                offered = made.backend.variants(made.lowered, made.target, made.folder)
                found, refused = variants(made, offered, program, arrays(self._inputs)) if offered else ([], [])
            self.left += [Outcome(made.backend.name, False, reason, passes=made.passes) for reason in failed.values()]
            step.done(", ".join(options_text(each.options) for each in found) or "none that computes the same")
        self.lowerings += found
        self.left += [
            Outcome(made.backend.name, False, reason, passes=made.passes, options=options)
            for options, reason in refused
        ]

    def _enter(self, passes: str, program: Program, apt: Sequence[Backend], folder: Path) -> OptcError | None:
        """Lower one program; to backends that compute its quantized layers in float only where no other takes it."""
        failure: OptcError | None = None
        groups = _by_arithmetic(program, apt, self._target)
        if is_quantized(program) and all(each.simulates_quantization(self._target) for each in apt):
            self._run.note(
                f"{', '.join(each.name for each in apt)}: no kernels for integers on {self._target.device}, so that"
                " quantized layers are computed in float, and take no less time for it"
            )
        for number, group in enumerate(groups):
            try:
                promising = self._first and not measured_on(program)
                lower = self._lower_where_promising if promising else self._lower
                if not lower(passes, program, group, folder):
                    continue
            except OptcError as error:
                failure = failure or error
                self.left += [Outcome(each.name, False, reason_of(error), passes=passes) for each in group]
                continue
            reason = "not tried: it computes quantized layers in float"
            rest = [each for group in groups[number + 1 :] for each in group]
            self.left += [Outcome(each.name, False, reason, passes=passes) for each in rest]
            return None
        return failure

    def names(self, several: bool) -> dict[str, Lowering]:
        """The lowerings by the names that they are measured under.

        Args:
            several: whether a single one is called by its backend, too.
        """

        def name(each: Lowering) -> str:
            backend = each.backend.name if several else ""
            return " ".join(filter(None, (OPTIMIZED, backend, each.passes, options_text(each.options))))

        return {name(each): each for each in self.lowerings}

    def _lower(
        self, passes: str, program: Program, apt: Sequence[Backend], folder: Path, needed: bool = True
    ) -> list[Lowering]:
        """Lower to each of the backends.

        Raises:
            BackendError: none takes the program, and one is ``needed``.
        """
        names = ", ".join(each.name for each in apt)
        with self._run.step(f"Lowering {passes} to {names}" if passes else f"Lowering to {names}") as step:
            lowered, refused = lower_all(list(apt), program, self._target, folder, step.update, needed)
            step.done("; ".join(f"{each.provider}, {each.precision}" for each in lowered))
        lowered = [replace(each, passes=passes) for each in lowered]
        self.lowerings += lowered
        self.left += [Outcome(name, False, reason, passes=passes) for name, reason in refused.items()]
        return lowered

    def _lower_where_promising(
        self, passes: str, program: Program, apt: Sequence[Backend], folder: Path
    ) -> list[Lowering]:
        """Lower to the fastest of those quick to lower to that takes it, then to others where that may pay."""
        quick = [each for each in apt if each.name in self._first and not has_own_process(each)]
        others, lowered = list(apt), list[Lowering]()
        for lead in sorted(quick, key=lambda each: self._first[each.name]):
            others.remove(lead)
            lowered = self._lower(passes, program, [lead], folder, needed=False)
            if lowered:
                others = self._promising(lowered[0], others)
                break
        if others:
            lowered += self._lower(passes, program, others, folder, needed=not quick)
        return lowered

    def _promising(self, led: Lowering, others: Sequence[Backend]) -> list[Backend]:
        """Those of the other backends that may win, if the program is to them what it is to the one it was lowered to.

        A backend that could not take the first program is one of them. One that was not given it, because it would have
        computed it in float, is expected to be as fast as the one the program was lowered to.
        """
        assert self._best is not None
        own, best = self._look([led, self._best], lambda text: None)
        if not math.isfinite(own / best):
            return list(others)
        found = []
        for each in others:
            unknown = self._first[led.backend.name] if each.simulates_quantization(self._target) else 0.0
            first = self._first.get(each.name, unknown)
            expected = own / best * first / self._first[led.backend.name]
            if expected <= (WORTH_COMPILING if has_own_process(each) else WORTHWHILE):
                found.append(each)
                continue
            times = f"{expected:.2f} times the latency of {self._best.passes} on {self._best.backend.name}"
            reason = f"not tried: expected to have {times}, going by {led.backend.name}"
            self.left.append(Outcome(each.name, False, reason, passes=led.passes))
        if own < best:
            self._best = led
        return found

    def _apt(self, passes: str, program: Program, chosen: Sequence[Backend]) -> Sequence[Backend]:
        """Not those that compile for seconds if the program's formats are those that were fastest on others."""
        measured = measured_on(program)
        apt = [each for each in chosen if each.name in measured or not has_own_process(each)]
        if not measured or not apt:
            return chosen
        reason = f"not tried: each layer's format is the fastest on {', '.join(sorted(measured))}"
        self.left += [Outcome(each.name, False, reason, passes=passes) for each in chosen if each not in apt]
        return apt

    def _worthwhile(self, chosen: Sequence[Backend], others: Sequence[str]) -> list[Backend]:
        """The backends that other programs are worth lowering to, by a look at what each made of the first."""
        with self._run.step("Comparing the backends") as step:
            p50 = self._look(self.lowerings, step.update)
            best = min(p50)
            self._first = {each.backend.name: taken for each, taken in zip(self.lowerings, p50, strict=True)}
            behind = {name for name, taken in self._first.items() if WORTHWHILE * best < taken < math.inf}
            worthwhile = [each for each in chosen if each.name not in behind]
            step.done(f"{', '.join(others)} on {', '.join(each.name for each in worthwhile)}")
        self._best = self.lowerings[p50.index(best)]
        first, rest = self._best.passes, SEPARATOR.join(others)
        for each in chosen:
            if each not in worthwhile:
                times = f"{self._first[each.name] / best:.1f} times the latency that it has on the fastest backend"
                self.left.append(Outcome(each.name, False, f"not tried: {first} has {times}", passes=rest))
        return worthwhile

    def _look(self, lowerings: Sequence[Lowering], progress: Callable[[str], None]) -> list[float]:
        """Nanoseconds that each takes, by a short measurement; infinite for what fails."""
        candidates = [candidate(str(number), each) for number, each in enumerate(lowerings)]
        found = measure(
            candidates,
            [arrays(self._inputs)],
            self._target,
            blocks=LOOK_BLOCKS,
            block_seconds=LOOK_SECONDS,
            watch_others=False,
            progress=progress,
        )
        p50 = [
            each.percentiles.p50_ns if each.percentiles and not each.error else math.inf
            for each in (found[candidate.name] for candidate in candidates)
        ]
        for each, taken in zip(lowerings, p50, strict=True):
            self._looked[each.title] = min(taken, self._looked.get(each.title, math.inf))
        return p50


def _by_arithmetic(program: Program, chosen: Sequence[Backend], target: Target) -> list[list[Backend]]:
    """The backends in groups: those that compute the program in its own types first."""
    quantized = is_quantized(program)
    own = [each for each in chosen if not (quantized and each.simulates_quantization(target))]
    return [group for group in (own, [each for each in chosen if each not in own]) if group]


def measured_on(program: Program) -> set[str]:
    """The backends that a program's formats were measured on: another time they may come out otherwise."""
    accounts = [record.notes.get("account") for record in program.history]
    return {row["backend"] for rows in accounts if is_account(rows) for row in rows or ()} - {""}


def arrays(query: tuple[Tensor, ...]) -> tuple[Array, ...]:
    """A query as runners take it."""
    return tuple(map(as_array, query))


def candidate(name: str, made: Lowering, instead_of: str = "") -> Candidate:
    """A lowering as what is measured."""
    quantized = "int8" in made.precision or "int4" in made.precision
    return Candidate(name, made.precision, quantized, made.load, made.bytes, instead_of=instead_of)


def candidates(lowerings: Mapping[str, Lowering]) -> list[Candidate]:
    """Lowerings, by name, as what is measured: those with other options instead of the one without."""
    plain = {(each.backend.name, each.passes): name for name, each in lowerings.items() if not each.options}
    return [
        candidate(name, each, plain.get((each.backend.name, each.passes), "") if each.options else "")
        for name, each in lowerings.items()
    ]
