"""What ``optc profile`` does, step by step, and everything it found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optc.bench.accuracy import AccuracyResult, measure_accuracy
from optc.bench.limits import in_force
from optc.bench.measure import measure
from optc.bench.overhead import Overhead, harness_overhead
from optc.bench.quiet import torch_threads
from optc.bench.reference import NONE, Reference, reference
from optc.bench.results import EARLY_STOPPING_QUERIES, Candidate, Measurement
from optc.bench.run import run_document
from optc.bench.scenario_result import MULTISTREAM_SAMPLES, ScenarioResult, failed
from optc.bench.scenarios import SECONDS, Plan, run_scenario
from optc.bench.settings import Scenario
from optc.bench.submission import Submission, slug
from optc.bench.surroundings import surroundings
from optc.data.dataset import named_split
from optc.errors import MeasurementError, OptcError, one_line
from optc.frontend.load import find_source
from optc.lowering.backend import Runner
from optc.paths import user_path
from optc.plugins.registry import blamed

if TYPE_CHECKING:
    from optc.cli.targets import Subject
    from optc.data.dataset import Dataset, Split
    from optc.progress import Progress, Step
    from optc.target import Target

BLOCK_SECONDS = 0.3
STEADY = 0.01
"""Share of the median to which it has to be known before SingleStream ends."""
STEADY_SECONDS = 8.0
"""Time after which it ends even so, once it has its fewest blocks."""
ARTIFACT_SECONDS, MODEL_SECONDS = 8.0, 60.0
"""Most time for the fewest blocks of an artifact, and of a model, which has several baselines to measure."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Attributes:
        scenarios: in the order to run them.
        against: the reference model, or ``"none"``.
        dataset: measure accuracy on its test split, too.
        output: keep LoadGen's logs here.
        commands: what was typed.
        limits: options that limit threads and the like, for the process that measures the reference.
    """

    target: Target
    scenarios: tuple[Scenario, ...]
    against: str
    dataset: Dataset | None
    official: bool
    user_conf: Path | None
    output: Path | None
    commands: tuple[str, ...]
    limits: tuple[str, ...]

    def in_full(self, scenario: Scenario) -> bool:
        """Whether a scenario's speed is measured in a run by MLPerf's rules; else in short blocks that take turns."""
        return scenario != "SingleStream" or self.official


@dataclass
class Profile:
    """What was found; fields are filled as the run goes on."""

    subjects: list[Subject]
    measurement: Measurement
    surroundings: dict[str, Any]
    scenarios: list[ScenarioResult] = field(default_factory=list)
    accuracies: list[AccuracyResult] = field(default_factory=list)
    overhead: Overhead | None = None
    reference: Reference | None = None
    notes: list[str] = field(default_factory=list)

    def subject_of(self, candidate: str) -> Subject:
        """The target that a candidate stands for."""
        return max((each for each in self.subjects if candidate.startswith(each.name)), key=lambda each: len(each.name))

    def to_dict(self) -> dict[str, Any]:
        """Everything, raw latencies included."""
        against = None
        if self.reference is not None:
            ratios = {each.name: asdict(self.reference.ratio(each)) for each in self.measurement.results if each.blocks}
            against = {
                "name": self.reference.name,
                "weights": self.reference.weights,
                "parameters": self.reference.parameters,
                "measured": self.reference.run.created,
                "file": self.reference.file and str(self.reference.file),
                "fastest": self.reference.result.name,
                "results": [asdict(result) for result in self.reference.run.results],
                "ratios": ratios,
            }
        return {
            **run_document(self.measurement, self.surroundings),
            "targets": [
                {"name": s.name, "weights": s.weights, "parameters": s.parameters, "accuracy": s.accuracy}
                for s in self.subjects
            ],
            "scenarios": [asdict(result) for result in self.scenarios],
            "accuracies": [{**asdict(each), "top1": each.top1} for each in self.accuracies],
            "overhead": asdict(self.overhead) if self.overhead else None,
            "against": against,
            "notes": self.notes,
        }


def profile(subjects: list[Subject], request: Request, progress: Progress) -> Profile:
    """Measure everything that was asked for; what fails is in the result with its reason.

    Raises:
        UnknownNameError: there is no such model to compare with.
        MeasurementError: nothing at all can be measured, as without LoadGen.
    """
    if request.against != NONE:
        source, given = find_source(request.against)
        if source.name == "pt2" and not user_path(given).is_file():
            raise MeasurementError(f"model file '{given}' does not exist", f"give another --against, or {NONE}")
    request = replace(request, target=_of_one_size(subjects, request))
    target, submission = request.target, None
    if request.output is not None:
        submission = Submission(request.output, target)
    candidates = [candidate for subject in subjects for candidate in subject.candidates(target.batch)]
    in_blocks = candidates if "SingleStream" in request.scenarios else []
    overhead = harness_overhead(candidates[0].inputs[0])
    with progress.step("Measuring with MLPerf LoadGen") as step:
        measurement = measure(
            in_blocks,
            [],
            target,
            block_seconds=BLOCK_SECONDS,
            block_queries=EARLY_STOPPING_QUERIES,
            steady=STEADY,
            steady_seconds=STEADY_SECONDS,
            limit_seconds=sum(ARTIFACT_SECONDS if each.is_artifact else MODEL_SECONDS for each in subjects),
            logs=partial(_block_logs, submission) if submission and not request.official else None,
            progress=step.update,
        )
    found = Profile(subjects, measurement, surroundings(target, in_force()), overhead=overhead)
    from optc.cli.targets import queries_of

    found.notes += [
        f"{each.name} is optimized for {queries_of(each.batch)}, not for {queries_of(target.batch)} as SingleStream's:"
        f" 'optc compare --batch {each.batch}' measures others"
        for each in subjects
        if in_blocks and each.batch != each.images(target.batch)
    ]
    if request.user_conf is not None and not all(map(request.in_full, request.scenarios)):
        found.notes.append("SingleStream is measured in blocks, without --user-conf: --official runs it so")
    random = [each for each in subjects if each.weights == "random"]
    found.notes += [f"{each.name}: no accuracy, its weights are random" for each in random]
    with torch_threads(target.threads):
        _scenarios(found, request, submission, progress)
    if request.against != NONE and in_blocks:
        _compare(found, request, progress)
    if submission is not None:
        precisions = {each.name: each.precision for each in found.measurement.results}
        precisions |= {each.name: each.precision for each in found.scenarios}
        weights = {name: found.subject_of(name).weights for name in precisions}
        confs = {each: request.user_conf if request.in_full(each) else None for each in request.scenarios}
        submission.describe(precisions, confs, weights, request.commands)
    return found


def _of_one_size(subjects: list[Subject], request: Request) -> Target:
    """The target, with as many images in a query as all subjects take: one, unless they take another number only.

    Raises:
        MeasurementError: they take different numbers, so that their latencies say nothing of each other.
    """
    sizes = {each.name: each.images(1) for each in subjects}
    if len(sizes) < len(subjects):
        raise MeasurementError("a target is named twice", "name each once; 'optc compare' takes one beside itself")
    if len(set(sizes.values())) > 1 and "SingleStream" in request.scenarios:
        told = ", ".join(f"{name} of {images}" for name, images in sizes.items())
        raise MeasurementError(
            f"they take queries of different numbers of images: {told}", "profile them by themselves"
        )
    return replace(request.target, batch=min(sizes.values()))


def _block_logs(submission: Submission, name: str, block: int) -> Path:
    return submission.performance(name, "SingleStream", block)


def _compare(found: Profile, request: Request, progress: Progress) -> None:
    """Find the reference; without it there is no comparison, and a note of why."""
    if any(request.against == subject.name for subject in found.subjects):
        return
    if request.target.batch != 1:
        images = request.target.batch
        found.notes.append(f"no comparison: {request.against} is measured with queries of one image, not of {images}")
        return
    if request.target.device != "cpu":
        found.notes.append(f"no comparison: {request.against} is measured on the CPU, not on {request.target.device}")
        return
    try:
        found.reference = reference(request.against, found.surroundings, request.limits, progress)
    except MeasurementError as error:
        found.notes.append(f"no comparison: {error}")


def _scenarios(found: Profile, request: Request, submission: Submission | None, progress: Progress) -> None:
    """The scenarios besides SingleStream's blocks, and accuracy, candidate by candidate."""
    for subject in found.subjects:
        split = _split(subject, request.dataset, found.notes)
        plan = Plan(slug(subject.name), request.target.threads, request.official, request.user_conf, SECONDS)
        for scenario in request.scenarios:
            in_full = request.in_full(scenario)
            if not in_full and split is None:
                continue
            batch = MULTISTREAM_SAMPLES if scenario in ("MultiStream", "Offline") else 1
            for candidate in subject.candidates(batch):
                only = _only_batch(subject, candidate, batch)
                if submission is not None:
                    plan = replace(plan, log_folder=partial(submission.performance, candidate.name))
                with progress.step(f"{scenario}: {candidate.name}") as step, _Opened(candidate, found.notes) as opened:
                    if in_full:
                        found.scenarios.append(
                            _performance(scenario, candidate, opened.runner_or_reason, plan, only, step)
                        )
                    if split is not None and request.dataset is not None and opened.runner is not None:
                        folder = submission.accuracy(candidate.name, scenario) if submission else None
                        named = (scenario, candidate.name)
                        _accuracy(found, *named, opened.runner, request.dataset, split, plan, only or batch, folder)


def _split(subject: Subject, dataset: Dataset | None, notes: list[str]) -> Split | None:
    if dataset is None:
        return None
    if subject.weights == "random":
        return None
    channels = subject.preprocessing.input_size[0]
    if channels not in (1, 3):
        notes.append(f"{subject.name}: no accuracy, it takes {channels} channels, and images have one or three")
        return None
    try:
        return named_split(dataset, "test", subject.preprocessing)
    except OptcError as error:
        notes.append(f"{subject.name}: no accuracy: {error}")
        return None


def _only_batch(subject: Subject, candidate: Candidate, asked: int) -> int | None:
    """The one number of images that a candidate takes at a time, if it takes no other."""
    takes_others = subject.images(asked) != subject.images(asked + 1)
    return None if takes_others and not candidate.specialised else len(candidate.inputs[0][0])


def _performance(
    scenario: Scenario, candidate: Candidate, opened: Runner | str, plan: Plan, batch: int | None, step: Step
) -> ScenarioResult:
    if isinstance(opened, str):
        return failed(scenario, candidate.name, opened, plan.official)
    if len({len(array) for array in candidate.inputs[0]}) > 1:
        reason = "one of its inputs is no batch, so that it has no single samples to answer for"
        return failed(scenario, candidate.name, reason, plan.official)
    one = tuple(array[:1] for array in candidate.inputs[0])
    samples = [one] * MULTISTREAM_SAMPLES
    try:
        result = run_scenario(scenario, opened, samples, candidate.name, plan, batch=batch, progress=step.update)
    except MeasurementError as error:
        result = failed(scenario, candidate.name, str(error), plan.official)
    verdict = "VALID" if result.valid else "INVALID"
    step.done(verdict if result.value is None else f"{result.value:.4g} {result.metric}, {verdict}")
    return result


def _accuracy(
    found: Profile,
    scenario: Scenario,
    name: str,
    runner: Runner,
    dataset: Dataset,
    split: Split,
    plan: Plan,
    batch: int,
    folder: Path | None,
) -> None:
    try:
        with blamed("dataset", dataset.name, dataset.origin):
            result = measure_accuracy(
                scenario,
                runner,
                split,
                name,
                model=plan.model,
                batch=batch,
                check_classes=dataset.check_classes,
                user_conf=plan.user_conf,
                log_folder=folder,
            )
        found.accuracies.append(result)
    except OptcError as error:
        found.notes.append(f"{name}: no accuracy in {scenario}: {error}")


class _Opened:
    """A candidate that is open while the block runs; where it does not open, the reason."""

    def __init__(self, candidate: Candidate, notes: list[str]) -> None:
        self._candidate, self._notes = candidate, notes
        self.runner: Runner | None = None
        self.reason = ""

    def __enter__(self) -> _Opened:
        try:
            self.runner = self._candidate.open()
        except Exception as error:
            self.reason = one_line(error)
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self.runner is not None:
                self.runner.close()
        except Exception as failure:
            self._notes.append(f"{self._candidate.name}: closing it failed: {one_line(failure)}")

    @property
    def runner_or_reason(self) -> Runner | str:
        return self.runner or self.reason
