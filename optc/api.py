"""The Python API: ``optimize`` reads top to bottom as what optc does to a model."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optc.batches import Batches, as_calibration, fixed_batch, in_batches_of
from optc.bench import choice_cache
from optc.bench.baselines import baselines
from optc.bench.choice import Outcome, choose
from optc.bench.latency import latencies
from optc.bench.measure import measure as measure_candidates
from optc.bench.results import Candidate, Measurement
from optc.budget import ACCURACY, Budget, Call, Metric, agreement, exceeds
from optc.evaluation import evaluation_mode
from optc.frontend.capture import capture
from optc.lowering.artifact import write_artifact
from optc.lowering.backend import Backend, Runner
from optc.lowering.lowering import AUTO, Lowering, backends, has_own_process, lower_all
from optc.machine import isa
from optc.ops.costs import node_costs
from optc.passmanager.contract import Calibration, Instrument, Pass, PassContext
from optc.passmanager.instruments import Statistics, Timing, Verify
from optc.passmanager.manager import PassManager, build_passes
from optc.program import ModelInfo, Program
from optc.progress import Progress, Step
from optc.report.report import Accuracy, BudgetOutcome, Report
from optc.target import Target

OPTIMIZED = "optc"
"""What the optimized model is called among the measured candidates."""


class Optimized:
    """An optimized model: callable like the module it was made from, with everything found out about it.

    Attributes:
        report: what each pass did and what it gained, as data.
        program: the optimized graph.
        target: what it was lowered for.
    """

    def __init__(self, program: Program, lowering: Lowering, folder: _TemporaryFolder) -> None:
        self.program = program
        self.target = lowering.target
        self.report: Report
        self._lowering = lowering
        self._folder = folder
        self._runner: Runner | None = None

    @property
    def files(self) -> list[Path]:
        """The runtime's files, in a temporary folder that lives as long as this object."""
        return self._lowering.files

    @property
    def details(self) -> dict[str, Any]:
        """What the backend had to say of the lowering."""
        return dict(self._lowering.lowered.details)

    def load(self) -> Runner:
        """A new runner over the files; the caller closes it."""
        return self._lowering.load()

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the runtime on tensors (batch first); returns what the original module would, as CPU tensors."""
        self._runner = self._runner or self.load()
        outputs = self._runner(*[tensor.detach().cpu().numpy() for tensor in inputs])
        return self.program.nested([torch.from_numpy(array) for array in outputs])

    def close(self) -> None:
        """Free the loaded runtime; the next call loads it again."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def save(self, path: str | Path) -> Path:
        """Write the artifact folder: the runtime's files, ``manifest.json`` and ``run.py``.

        Raises:
            ArtifactError: ``path`` exists or cannot be written; nothing is left behind then.
        """
        made, report = self._lowering, self.report.to_dict()
        report["costs"] = [asdict(cost) for cost in node_costs(self.program, self.target.batch)]
        return write_artifact(
            Path(path), made.folder, made.lowered, self.program, made.backend.name, report, self.target
        )


def optimize(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    passes: str | Sequence[str | Pass] | PassManager = "fuse,quant",
    *,
    pass_options: Mapping[str, Mapping[str, Any]] | None = None,
    backend: str = AUTO,
    calibration: Calibration | Iterable[Tensor | tuple[Tensor, ...]] | None = None,
    evaluate: Callable[[Call], float] | None = None,
    max_drop: float | None = None,
    validate: Callable[[Call], float] | None = None,
    verification: Sequence[tuple[Tensor, ...]] | None = None,
    verify: bool = True,
    measure: bool = True,
    target: Target | None = None,
    info: ModelInfo | None = None,
    instruments: Sequence[Instrument] = (),
    progress: Progress | None = None,
) -> Optimized:
    """Optimize a model: capture it, run passes over it, prove each, lower it, measure it.

    Args:
        model: put into eval mode for the time of the run; never changed.
        example_inputs: one tensor per positional argument of ``model``, batch first.
        passes: names as in ``"fuse,quant"``, or a list of names and :class:`Pass` objects.
        pass_options: by pass name, its options.
        backend: name of the runtime to lower to, or ``"auto"``: lower to every one that runs here and takes the model,
            and keep the fastest. What was measured before on this machine with these versions is not measured again.
        calibration: input batches for passes that need activation ranges; must not be what ``evaluate`` uses.
        evaluate: given something callable like ``model``, returns the task metric, 0 to 1; called before and after.
        max_drop: percentage points that ``evaluate`` may fall by at most. Layers go back to float until it holds; if
            nothing holds, only passes that promise exact outputs are run. Without ``evaluate``, it limits the share of
            verification samples whose largest output becomes another.
        validate: the same metric on other data, for the search; ``evaluate`` then only confirms the result.
        verification: batches to compare outputs on after every pass; if not given, the first batch of ``calibration``,
            and without that ``example_inputs``, which often are noise that no trained model is meant for.
        verify: compare outputs after every pass, and the runtime's with the graph's.
        measure: measure latency against the best unquantized baselines. Backends are measured against each other, where
            there are several, in any case.
        target: device and threads; by default the CPU with all threads this process may use.
        info: what is known of the model, for the manifest.
        instruments: further watchers of the passes.
        progress: told of each step.

    Raises:
        CaptureError: the model cannot be captured.
        VerificationError: a pass changed what the model computes; nothing was lowered.
        BackendError: the runtime cannot run the result.
    """
    run = _Run(progress or Progress())
    target = target or Target()
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    pipeline = passes if isinstance(passes, PassManager) else build_passes(passes, pass_options)
    chosen, refused = backends(backend, target)

    with run.step("Capturing the graph") as step:
        captured = capture(model, inputs, info=info)
        model_bytes = captured.constant_bytes()
        step.done(f"{captured.operator_count()} operators, {model_bytes / 1e6:.1f} MB")
    watchers: list[Instrument] = [Timing(), Statistics()]
    ranges = as_calibration(calibration, captured)
    batches = list(Batches(verification or _representative(ranges, captured), captured))
    if verify:
        with run.step("Running the captured model on verification inputs"):
            watchers.append(Verify(captured, batches, Path.cwd()))
    metric = _metric(evaluate, captured, batches if max_drop is not None else None)
    before = _before(run, metric, model, captured)
    search = _metric(validate, captured, None) or metric
    measures = {each.name: _latency_on(each, target) for each in chosen if not has_own_process(each)}
    flags = isa() if target.device == "cpu" else None
    context = PassContext(target, ranges, (*watchers, *instruments), isa=flags, note=run.note, latency=measures)

    tried: list[str] = []
    for trial in _trials(pipeline, max_drop):
        with run.step(trial.title) as step:
            budget = _budget(search, model, captured, trial.max_drop)
            given = replace(context, progress=step.update, budget=budget)
            program = trial.passes(captured, given).program
            step.done(", ".join(record.name for record in program.history if record.modified) or "no changes")
        if max_drop is None:
            del captured, watchers, batches, context, given, budget  # frees the float weights
            gc.collect()
        lowered = _lower(run, model, inputs, program, chosen, refused, target, backend == AUTO, measure)
        optimized = Optimized(program, lowered.kept, lowered.folder)
        accuracy = _after(run, metric, before, optimized)
        if max_drop is None or accuracy.drop is None or not exceeds(accuracy.drop, max_drop):
            break
        tried.append(f"{trial.what} lost {accuracy.drop:.2f} points")
    optimized.report = Report(
        model=program.info,
        passes=program.history,
        backend=lowered.kept.backend.name,
        provider=lowered.kept.provider,
        precision=lowered.kept.precision,
        model_bytes=model_bytes,
        file_bytes=lowered.kept.bytes,
        accuracy=accuracy,
        budget=BudgetOutcome.of(max_drop, accuracy, pipeline, program.history, tried),
        measurement=lowered.measurement if measure else None,
        backends=lowered.outcomes,
        calibration=ranges.description if ranges is not None else "",
        lowering=optimized.details,
        seconds=run.seconds,
        notes=tuple(dict.fromkeys((*program.info.notes, *run.notes, *lowered.notes))),
    )
    return optimized


@dataclass(frozen=True)
class _Trial:
    """One way to stay within the budget: passes, and the drop that they may search within."""

    what: str
    passes: PassManager
    max_drop: float | None

    @property
    def title(self) -> str:
        return "Running passes" if self.what == "the passes" else f"Running passes again: {self.what}"


def _trials(pipeline: PassManager, max_drop: float | None) -> Iterator[_Trial]:
    """As asked; with half the budget, should the runtime or other data cost more; what is exact alone."""
    yield _Trial("the passes", pipeline, max_drop)
    if max_drop is not None:
        yield _Trial("half the budget", pipeline, max_drop / 2)
        exact = PassManager([each for each in pipeline.leaves() if each.numerics.exact])
        yield _Trial("exact passes alone", exact, None)


@dataclass(frozen=True)
class _Lowered:
    kept: Lowering
    outcomes: tuple[Outcome, ...]
    measurement: Measurement | None
    notes: tuple[str, ...]
    folder: _TemporaryFolder


def _lower(
    run: _Run,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    program: Program,
    chosen: list[Backend],
    refused: Mapping[str, str],
    target: Target,
    several: bool,
    measure: bool,
) -> _Lowered:
    """Lower to every backend in question, measure, keep one."""
    remembered = choice_cache.file_of(program, target, chosen) if several and len(chosen) > 1 else None
    known = choice_cache.recall(remembered) if remembered else None
    if known:
        chosen = [each for each in chosen if each.name == known.outcomes[0].backend]
    folder = _TemporaryFolder()
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
    return _Lowered(kept, outcomes, measurement, notes, folder)


class _TemporaryFolder:
    """A folder that is removed with the object, or at exit."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="optc-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class _Run:
    """Steps of one run: shown to the user and timed."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self._progress = progress

    def note(self, text: str) -> None:
        """Show a line at once and keep it for the report."""
        if text not in self.notes:
            self._progress.note(text, important=True)
            self.notes.append(text)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        start = time.perf_counter()
        with self._progress.step(title) as step:
            yield step
        self.seconds[title] = time.perf_counter() - start


def _representative(ranges: Calibration | None, captured: Program) -> list[tuple[Tensor, ...]]:
    """A batch like those the model is meant for; what is wrong with calibration data, the pass that reads it tells."""
    first = next(iter(ranges), None) if ranges is not None else None
    fits = first is not None and len(first) == len(captured.example_inputs)
    if first is None or not fits or not all(bool(tensor.isfinite().all()) for tensor in first):
        return [captured.example_inputs]
    return [first]


def _metric(
    given: Callable[[Call], float] | None, captured: Program, batches: Sequence[tuple[Tensor, ...]] | None
) -> Metric | None:
    """The caller's metric by its name; without one, agreement with the captured model on ``batches``, if there are."""
    if given is None:
        return None if batches is None else agreement(captured.call, batches)
    return given if isinstance(given, Metric) else Metric(ACCURACY, given, "the data of 'evaluate'")


def _meaningless(metric: Metric | None, program: Program) -> str:
    """Why there is no metric to report; the accuracy of random weights would be a number without a meaning."""
    if program.info.weights == "random" and (metric is None or metric.name == ACCURACY):
        return "not measurable: random weights"
    return "" if metric is not None else "not measured: no labelled data was given"


def _before(run: _Run, metric: Metric | None, model: nn.Module, captured: Program) -> Accuracy:
    """The metric of the model itself."""
    if (reason := _meaningless(metric, captured)) or metric is None:
        return Accuracy(reason=reason)
    with run.step("Evaluating the captured model") as step, torch.no_grad(), evaluation_mode(model):
        before = metric(in_batches_of(fixed_batch(captured), model))
        step.done(f"{metric.name} {before:.2%}")
    return Accuracy(before, None, metric.data, metric=metric.name)


def _after(run: _Run, metric: Metric | None, before: Accuracy, optimized: Optimized) -> Accuracy:
    """The metric of the optimized model beside that of the model itself."""
    if metric is None or before.reason:
        return before
    with run.step("Evaluating the optimized model") as step:
        after = metric(in_batches_of(fixed_batch(optimized.program), optimized))
        optimized.close()
        step.done(f"{metric.name} {after:.2%}")
    return replace(before, after=after)


def _budget(metric: Metric | None, model: nn.Module, captured: Program, max_drop: float | None) -> Budget | None:
    """What passes may lose of the metric; nothing is asked of them without one, or without a limit."""
    if metric is None or max_drop is None or _meaningless(metric, captured):
        return None
    fitted = replace(metric, score=lambda call: metric(in_batches_of(fixed_batch(captured), call)))
    with torch.no_grad(), evaluation_mode(model):
        return Budget(fitted, fitted(model), max_drop)


def _latency_on(backend: Backend, target: Target) -> Callable[[Sequence[Program]], list[float]]:
    return lambda programs: latencies(programs, backend, target)


def _measure(
    run: _Run,
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
