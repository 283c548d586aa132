"""The Python API: ``optimize`` reads top to bottom as what optc does to a model."""

from __future__ import annotations

import copy
import gc
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optc.accuracy import after_of, before_of, budget_of, metric_of
from optc.batches import Batches, as_calibration, at_batch, first_samples, fixed_batch
from optc.bench.latency import latencies
from optc.budget import Call, Metric, exceeds
from optc.contest import TemporaryFolder
from optc.errors import BackendError, CaptureError, OptcError, VerificationError
from optc.frontend.capture import capture, checked_inputs
from optc.lowering.agreement import as_array
from optc.lowering.artifact import write_artifact
from optc.lowering.backend import Array, Backend, Runner
from optc.lowering.lowering import AUTO, Lowering, backends, has_own_process
from optc.lowering.node_times import node_times
from optc.lowering.pipeline import staged
from optc.machine import isa, total_memory
from optc.ops.costs import node_costs
from optc.passmanager.alternatives import Alternatives
from optc.passmanager.compare import compare
from optc.passmanager.contract import Calibration, Instrument, Latency, Pass, PassContext
from optc.passmanager.instruments import Statistics, Timing, Verify
from optc.passmanager.manager import PassManager
from optc.plugins.registry import blamed
from optc.program import ModelInfo, Program
from optc.progress import Progress, Run
from optc.report.report import BudgetOutcome, Report
from optc.rewrite import is_quantized
from optc.selection import select
from optc.target import Target


class Optimized:
    """An optimized model: callable like the module it was made from, with everything found out about it.

    Attributes:
        report: what each pass did and what it gained, as data.
        program: the optimized graph.
        target: what it was lowered for.
    """

    def __init__(self, program: Program, lowering: Lowering, folder: TemporaryFolder) -> None:
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

    def __call__(self, *inputs: Tensor | Array) -> Any:
        """Run the runtime on tensors or arrays, batch first; returns what the module would, as CPU tensors."""
        backend = self._lowering.backend
        with blamed("backend", backend.name, backend.origin):
            self._runner = self._runner or self.load()
            outputs = self._runner(*(as_array(each) if isinstance(each, Tensor) else each for each in inputs))
        nodes: Any = self.program.graph.output_node().args[0]
        types = [node.meta["val"].dtype for node in nodes]
        # numpy has no bfloat16: runners hand it out as float32
        tensors = [torch.from_numpy(array).to(dtype) for array, dtype in zip(outputs, types, strict=True)]
        return self.program.nested(tensors)

    def close(self) -> None:
        """Free the loaded runtime; the next call loads it again."""
        runner, self._runner = self._runner, None
        if runner is not None:
            with blamed("backend", self._lowering.backend.name, self._lowering.backend.origin):
                runner.close()

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
    passes: str | Sequence[str | Pass] | PassManager | Alternatives = "fuse,quant",
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
        passes: names as in ``"fuse,quant"``, or a list of names and :class:`Pass` objects. Of several lists, as in
            ``"fuse,quant | fuse,bf16"``, each is run and the fastest result kept; ``"auto"`` stands for those that are
            worth trying: int8, a format for each layer, int8 with bf16 between, bf16, and float;
            on a GPU fp16 takes the place of bf16.
        pass_options: by pass name, its options.
        backend: name of the runtime to lower to, or ``"auto"``: lower to every one that runs here and takes the model,
            and keep the fastest. What was measured before on this machine with these versions is not measured again.
        calibration: input batches for passes that need activation ranges; must not be what ``evaluate`` uses.
        evaluate: given something callable like ``model``, returns the task metric, 0 to 1; called before and after.
        max_drop: percentage points that ``evaluate`` may fall by at most. Layers go back to float until it holds; if
            nothing holds, the passes are run without ``quant``, and if that is too much those that promise exact
            outputs alone. Without ``evaluate``, it limits the share of
            verification samples whose largest output becomes another.
        validate: the same metric on other data, for the search; ``evaluate`` then only confirms the result.
        verification: batches to compare outputs on after every pass; if not given, the first of ``calibration``,
            and without that ``example_inputs``, which often are noise that no trained model is meant for.
        verify: compare outputs after every pass, and the runtime's with the graph's.
        measure: measure latency against the best unquantized baselines. Backends are measured against each other, where
            there are several, in any case.
        target: device and threads; by default the CPU with one thread for each core.
        info: what is known of the model, for the manifest.
        instruments: further watchers of the passes.
        progress: told of each step.

    Raises:
        CaptureError: the model cannot be captured.
        VerificationError: a pass changed what the model computes; nothing was lowered. With ``max_drop``, a pass that
            only is noisier than it promised is tried again with less noise.
        BackendError: the runtime cannot run the result.
    """
    run = Run(progress or Progress())
    target = target or Target()
    inputs = checked_inputs(model, (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs)
    if max_drop is not None and not 0.0 <= max_drop <= 100.0:
        raise OptcError(f"max_drop is {max_drop:g}", "give percentage points, from 0 to 100")
    asked = Alternatives.of(passes, pass_options)
    chosen, refused = backends(backend, target)

    original, (model, inputs) = model, _on_cpu(model, inputs)
    with run.step("Capturing the graph") as step:
        captured = capture(model, inputs, info=info)
        model_bytes = captured.constant_bytes()
        step.done(f"{captured.operator_count()} operators, {model_bytes / 1e6:.1f} MB")
    fixed = fixed_batch(captured) or target.batch
    in_parts = [each.name for each in asked.first.leaves()][-1:] == ["partition"]  # which are of the fixed batch each
    if target.batch not in (1, fixed) and not in_parts:
        taken = f"the model takes a batch of {fixed} only, not of {target.batch}"
        raise CaptureError(taken, "export it with that batch, or with the batch dynamic")
    if target.batch % fixed and in_parts:
        run.note(f"the model takes a batch of {fixed} only: that is a microbatch")
    target = replace(target, batch=fixed)
    inputs = at_batch(inputs, captured, target.batch)
    watchers: list[Instrument] = [Timing(), Statistics()]
    ranges = as_calibration(calibration, captured)
    seen = verification if verification is not None and len(verification) else _representative(ranges, captured)
    batches = list(Batches(seen, captured, "verification"))
    if not batches:
        batches = [captured.example_inputs]
        run.note(
            f"there is no batch of {fixed_batch(captured)} to verify with: outputs are compared on the example inputs"
        )
    captured = replace(captured, example_inputs=first_samples(batches, captured))
    flags = isa() if target.device == "cpu" else None
    if verify:
        with run.step("Running the captured model on verification inputs"):
            watch = Verify(captured, batches, Path.cwd(), PassContext(target, ranges, isa=flags))
            watchers.append(watch)
            for remark in watch.remarks:
                run.note(remark)
    metric = metric_of(evaluate, captured, batches if max_drop is not None else None)
    # Agreement has batches of its own, on the CPU; a caller's metric is asked about the model as it was given.
    before = before_of(run, metric, original if evaluate is not None else model, captured)
    search = metric_of(validate, captured, None, "validate") or metric
    if max_drop is not None and search is metric and metric is not None:
        run.note(f"how much is lost is looked for and confirmed on the same data, {metric.data}: validate= takes other")
    if search is not None and model is not original:  # the captured model is on the CPU
        search = replace(search, score=partial(_from_any_device, search))
    quick = [each for each in chosen if not has_own_process(each)]
    quick = [each for each in quick if not each.simulates_quantization(target)] or quick
    measures = {each.name: _latency_on(each, target) for each in quick}
    context = PassContext(
        target,
        ranges,
        (*watchers, *instruments),
        isa=flags,
        note=run.note,
        latency=measures,
        node_times=node_times,
        memory=total_memory(),
    )

    whole = budget_of(search, model, captured, max_drop)
    tried: list[str] = []
    least_db = -math.inf
    last: list[str] = []
    for trial in _trials(asked, max_drop):
        budget = None
        if whole and trial.max_drop is not None:
            budget = replace(whole, max_drop=trial.max_drop, min_sqnr_db=least_db)
        try:
            with run.step(trial.title) as step:
                given = replace(context, progress=step.update, budget=budget)
                made = trial.passes.run(captured, given, step.update)
                step.done("; ".join(map(_modified, made.programs.values())))
        except VerificationError as error:
            if trial.max_drop is None or error.min_sqnr_db is None:
                raise
            if error.reproducer is not None:  # nobody is told of it
                shutil.rmtree(error.reproducer, ignore_errors=True)
            tried.append(f"{trial.what}: {error.message}")
            least_db = error.min_sqnr_db + _MORE_DB
            continue
        if trial.max_drop is not None:
            doing = [each.fingerprint(contents=True) for each in made.programs.values()]
            if doing == last:
                continue
            last = doing
        program = next(iter(made.programs.values()))
        if max_drop is None:
            del captured, watchers, batches, context, given, whole, budget  # frees the float weights
            gc.collect()
        into = staged(program, chosen, backend == AUTO)
        several = backend == AUTO and into is chosen
        held = False
        while True:
            try:
                lowered = select(run, model, inputs, made, into, refused, target, several, measure)
            except BackendError as error:
                if trial.max_drop is None:
                    raise
                tried.append(f"{trial.what}: {error.message}")
                least_db = _sqnr_db(captured, program, batches) + _MORE_DB
                break
            program = made.programs[lowered.kept.passes]
            optimized = Optimized(program, lowered.kept, lowered.folder)
            accuracy = after_of(run, metric, before, program, optimized)
            optimized.close()
            held = max_drop is None or accuracy.drop is None or not exceeds(accuracy.drop, max_drop)
            if held:
                break
            what = trial.what if len(made.programs) + len(made.dropped) == 1 else lowered.kept.passes
            tried.append(f"{what} lost {accuracy.drop:.2f} points")
            if len(made.programs) == 1 or is_quantized(program):
                least_db = _sqnr_db(captured, program, batches) + _MORE_DB
                break
            # Less noise in quantized layers would not mend it: another list may keep the budget as it is.
            made = made.without(lowered.kept.passes, tried[-1])
            program = next(iter(made.programs.values()))
        if held:
            break
    kept = asked.lists.get(lowered.kept.passes, asked.first)
    optimized.report = Report(
        model=program.info,
        passes=program.history,
        backend=lowered.kept.backend.name,
        provider=lowered.kept.provider,
        precision=lowered.kept.precision,
        model_bytes=model_bytes,
        file_bytes=lowered.kept.bytes,
        accuracy=accuracy,
        budget=BudgetOutcome.of(max_drop, accuracy, kept, program.history, tried),
        measurement=lowered.measurement if measure else None,
        backends=lowered.outcomes,
        calibration=ranges.description if ranges is not None else "",
        lowering=optimized.details,
        seconds=run.seconds,
        notes=tuple(dict.fromkeys((*program.info.notes, *run.notes, *lowered.notes))),
    )
    return optimized


def _on_cpu(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of a model that is on a GPU, and of its inputs: passes work and are verified on the CPU."""
    if all(tensor.device.type == "cpu" for tensor in inputs):
        return model, inputs
    return copy.deepcopy(model).cpu(), tuple(tensor.cpu() for tensor in inputs)


def _from_any_device(metric: Metric, call: Call) -> float:
    return metric(lambda *inputs: call(*(tensor.cpu() for tensor in inputs)))


_MORE_DB = 3.0
"""By how much the outputs have to come closer, half the noise, when a trial lost too much of the metric."""


@dataclass(frozen=True)
class _Trial:
    """One way to stay within the budget: passes, and the drop that they may search within."""

    what: str
    passes: Alternatives
    max_drop: float | None

    @property
    def title(self) -> str:
        return "Running passes" if self.what == "the passes" else f"Running passes again: {self.what}"


def _trials(asked: Alternatives, max_drop: float | None) -> Iterator[_Trial]:
    """As asked; with less of the budget, should the runtime or other data cost more; unquantized; exact passes alone.

    A trial that makes the same as the one before it is passed over.
    """
    yield _Trial("the passes", asked, max_drop)
    if max_drop is not None:
        yield _Trial("half the budget", asked, max_drop / 2)
        yield _Trial("a quarter of the budget", asked, max_drop / 4)
        unquantized = asked.unquantized()
        if any(not each.numerics.exact for manager in unquantized.lists.values() for each in manager.leaves()):
            yield _Trial("without quantization", unquantized, max_drop)
        yield _Trial("exact passes alone", asked.exact(), None)


def _modified(program: Program) -> str:
    return ", ".join(record.name for record in program.history if record.modified) or "no changes"


def _sqnr_db(captured: Program, program: Program, batches: Sequence[tuple[Tensor, ...]]) -> float:
    outputs = ([each.run(*batch) for batch in batches] for each in (captured, program))
    return compare(*outputs).sqnr_db


def _representative(ranges: Calibration | None, captured: Program) -> list[tuple[Tensor, ...]]:
    """Batches like those the model is meant for, of few images together: a single one may be far from the others.

    Of calibration data that holds NaN or Inf, the pass that reads it tells.
    """
    found: list[tuple[Tensor, ...]] = []
    for batch in ranges or ():
        if not all(bool(tensor.isfinite().all()) for tensor in batch):
            return [captured.example_inputs]
        found.append(batch)
        if sum(inputs[0].shape[:1].numel() for inputs in found) >= _VERIFICATION_IMAGES:
            break
    return found or [captured.example_inputs]


_VERIFICATION_IMAGES = 8


def _latency_on(backend: Backend, target: Target) -> Latency:
    return lambda programs, seconds=0.0: latencies(programs, backend, target, seconds)
