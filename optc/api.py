"""The Python API: ``optimize`` reads top to bottom as what optc does to a model."""

from __future__ import annotations

import gc
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optc.bench import choice_cache
from optc.bench.baselines import baselines
from optc.bench.choice import Outcome, choose
from optc.bench.latency import latencies
from optc.bench.measure import measure as measure_candidates
from optc.bench.results import Candidate, Measurement
from optc.evaluation import evaluation_mode
from optc.frontend.capture import capture
from optc.lowering.artifact import write_artifact
from optc.lowering.backend import Backend, Runner
from optc.lowering.lowering import AUTO, Lowering, backends, has_own_process, lower_all
from optc.passmanager.contract import Calibration, Instrument, Pass, PassContext
from optc.passmanager.instruments import Statistics, Timing, Verify
from optc.passmanager.manager import PassManager, build_passes
from optc.program import ModelInfo, Program
from optc.progress import Progress, Step
from optc.report.report import Accuracy, Report
from optc.target import Target

Call = Callable[..., Any]
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
        tensors, spec = [torch.from_numpy(array) for array in outputs], self.program.output_spec
        return pytree.tree_unflatten(tensors, spec) if spec is not None else tuple(tensors)

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
        evaluate: given something callable like ``model``, returns the task metric; called before and after.
        verification: batches to compare outputs on after every pass; ``example_inputs`` if not given.
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
    if verify:
        with run.step("Running the captured model on verification inputs"):
            batches = _Batches(verification or [captured.example_inputs], captured)
            watchers.append(Verify(captured, list(batches), Path.cwd()))
    with run.step("Running passes") as step:
        ranges = _as_calibration(calibration, captured)
        measures = {each.name: _latency_on(each, target) for each in chosen if not has_own_process(each)}
        context = PassContext(target, ranges, (*watchers, *instruments), step.update, latency=measures)
        program = pipeline(captured, context).program
        step.done(", ".join(record.name for record in program.history if record.modified) or "no changes")
    del captured, watchers, context
    gc.collect()

    several = backend == AUTO
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
    kept, outcomes, notes = lowerings[0], tuple[Outcome, ...](), program.info.notes
    if known:
        outcomes = known.outcomes
        notes += (f"backend chosen by the measurement of {known.measured}; to measure again, delete {remembered}",)
    elif several:
        kept, outcomes = choose(names, {**refused, **failed}, measurement)
        if remembered and measurement is not None:
            choice_cache.remember(remembered, outcomes)
    for made in lowerings:
        if made is not kept:
            shutil.rmtree(made.folder)
    optimized = Optimized(program, kept, folder)
    optimized.report = Report(
        model=program.info,
        passes=program.history,
        backend=kept.backend.name,
        provider=kept.provider,
        precision=kept.precision,
        model_bytes=model_bytes,
        file_bytes=kept.bytes,
        accuracy=_evaluate(run, evaluate, model, optimized),
        measurement=measurement if measure else None,
        backends=outcomes,
        calibration=ranges.description if ranges is not None else "",
        lowering=optimized.details,
        seconds=run.seconds,
        notes=notes,
    )
    return optimized


class _TemporaryFolder:
    """A folder that is removed with the object, or at exit."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="optc-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class _Run:
    """Steps of one run: shown to the user and timed."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        start = time.perf_counter()
        with self._progress.step(title) as step:
            yield step
        self.seconds[title] = time.perf_counter() - start


class _Batches:
    """Any iterable of tensors or tuples of tensors as a :class:`Calibration`.

    Where the program takes one batch size only, batches are cut to it; what is left over at the end of one is not used.
    """

    def __init__(self, batches: Iterable[Tensor | tuple[Tensor, ...]], program: Program) -> None:
        self.description = getattr(batches, "description", "batches given by the caller")
        self._batches = batches if hasattr(batches, "__len__") else list(batches)
        self._size = None if program.dynamic_batch else program.example_inputs[0].shape[0]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for batch in self._batches:
            tensors = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            if self._size is None:
                yield tensors
            else:
                for start in range(0, len(tensors[0]) - self._size + 1, self._size):
                    yield tuple(tensor[start : start + self._size] for tensor in tensors)


def _as_calibration(
    given: Calibration | Iterable[Tensor | tuple[Tensor, ...]] | None, program: Program
) -> Calibration | None:
    if given is None or (hasattr(given, "description") and program.dynamic_batch):
        return given  # type: ignore[return-value]  # a Calibration is recognised by its description
    return _Batches(given, program)


def _evaluate(run: _Run, evaluate: Callable[[Call], float] | None, model: nn.Module, optimized: Optimized) -> Accuracy:
    """The metric before and after; none for random weights, whose accuracy would be a number without a meaning."""
    if optimized.program.info.weights == "random":
        return Accuracy(reason="not measurable: random weights")
    if evaluate is None:
        return Accuracy(reason="not measured: no labelled data was given")
    if not optimized.program.dynamic_batch:
        return Accuracy(reason="not measured: the model takes one batch size only")
    with run.step("Evaluating the captured model") as step, torch.no_grad():
        with evaluation_mode(model):
            before = evaluate(model)
        step.done(f"{before:.2%}")
    with run.step("Evaluating the optimized model") as step:
        after = evaluate(optimized)
        optimized.close()
        step.done(f"{after:.2%}")
    return Accuracy(before, after)


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
