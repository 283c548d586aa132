"""``optc compare``: which target is faster, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from optc.cli.options import (
    json_option,
    limit_options,
    print_json,
    progress_for,
    target_options,
    verbosity_options,
    weights_option,
)
from optc.cli.terminal import stdout
from optc.cli.values import IMAGES, TEXT
from optc.errors import MeasurementError

if TYPE_CHECKING:
    from optc.bench.compare import Contender
    from optc.bench.run import Run
    from optc.cli.targets import Subject
    from optc.progress import Progress
    from optc.target import Target

ROUNDS, BLOCK_SECONDS = 10, 0.3
LIMIT_SECONDS = 120.0


@click.command("compare")
@click.argument("targets", nargs=-1, required=True, type=TEXT)
@weights_option
@click.option("--batch", type=IMAGES, help="Images in a query.  [default: what the first artifact is optimized for]")
@click.option("--force", is_flag=True, help="Compare runs of different machines, threads or versions all the same.")
@limit_options
@target_options
@json_option
@verbosity_options
def command(
    targets: tuple[str, ...],
    weights: str,
    batch: int | None,
    force: bool,
    cpu_affinity: str | None,
    memory_limit: str | None,
    threads: int | None,
    allow_fallback: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Compare the latency of TARGETS with that of the first.

    A target is an artifact folder, a folder of such, a model, or a saved run: the folder that 'optc profile -o' wrote,
    or what 'optc profile --json' printed, as a .json file. Artifacts and models are measured now, in blocks that take
    turns. Of a model, and of a run with several candidates, the fastest counts.

    \b
    Examples:
      optc compare resnet50-int8 resnet50-fused
      optc compare alexnet-int8 alexnet --batch 16
      optc compare monday.json friday.json
    """  # noqa: D301  (click takes a real backspace for "do not wrap")
    from optc.bench.limits import limited, parse_bytes, parse_cpus

    cpus = parse_cpus(cpu_affinity) if cpu_affinity else None
    memory = parse_bytes(memory_limit) if memory_limit else None
    progress = progress_for(verbose, quiet)
    with limited(cpus=cpus):
        with progress.step("Importing PyTorch"):
            from optc.cli.targets import Subject, device_of, queries_of, subjects
            from optc.report.comparison import comparison_table
            from optc.report.report import jsonable
            from optc.target import Target
            from optc.threads import available_threads

        target = Target(threads=threads or available_threads(), allow_fallback=allow_fallback)
        with limited(memory_bytes=memory):
            given: list[Run | Subject] = []
            for name in targets:
                saved = _saved(name)
                given += subjects([name], weights, target, progress) if saved is None else [saved]
            live = [each for each in given if isinstance(each, Subject)]
            device = device_of(live) if live else target.device
            target = replace(target, device=device, batch=batch or _batch(given))
            document = _compare(given, target, force, progress)
    found, compared, notes = document["targets"], document["comparisons"], document["notes"]
    if as_json:
        plain = {"targets": [asdict(each) for each in found], "comparisons": [each.to_dict() for each in compared]}
        print_json(jsonable({**document, **plain}))
        return
    console = stdout()
    if target.batch > 1:
        console.print(Text(f"Latency of {queries_of(target.batch)}", style="bold"))
    console.print(comparison_table(found, compared))
    for line in dict.fromkeys((*notes, *(warning for each in found for warning in each.warnings))):
        console.print(Text(f"! {line}", style="yellow"))
    for each in compared:
        console.print(Text(each.verdict, style="bold"))


def _compare(given: Sequence[Run | Subject], target: Target, force: bool, progress: Progress) -> dict[str, Any]:
    """Measure what is not a saved run and compare everything with the first.

    Raises:
        MeasurementError: conditions or numbers of images differ.
    """
    from optc.bench.compare import comparisons, contender, refuse_unless_alike
    from optc.bench.limits import in_force
    from optc.bench.run import Run
    from optc.bench.surroundings import surroundings
    from optc.cli.targets import queries_of

    if len(given) < 2:
        raise click.UsageError("compare needs two targets or more")
    here = surroundings(target, in_force())
    conditions = [(each.name, each.surroundings) for each in given if isinstance(each, Run)]
    if len(conditions) < len(given):
        conditions.append(("this run", here))
    notes = refuse_unless_alike(conditions, force)
    for each in given:
        if not isinstance(each, Run) and (images := each.images(target.batch)) != target.batch:
            raise MeasurementError(
                f"'{each.name}' takes {queries_of(images)} only, not {queries_of(target.batch)} as the others",
                f"compare with --batch {images}",
            )
    live, warnings = _measured([each for each in given if not isinstance(each, Run)], target, progress)
    measured = iter(live)
    found = [
        contender(each.name, each.results, saved=True) if isinstance(each, Run) else next(measured) for each in given
    ]
    compared = comparisons(found)
    notes += warnings
    notes += [f"{each.name}: {warning}" for each in given if isinstance(each, Run) for warning in each.warnings]
    notes += _other_batches(given, target.batch)
    if any(not each.interleaved for each in compared):
        notes.append("measured at different times: what changed on the machine in between is in the ratio as well")
    return {"surroundings": here, "targets": found, "comparisons": compared, "notes": notes}


def _batch(given: Sequence[Run | Subject]) -> int:
    """Images in a query: of the first saved run or artifact."""
    from optc.bench.run import Run

    known = (
        int(each.surroundings.get("batch", 1)) if isinstance(each, Run) else each.batch
        for each in given
        if isinstance(each, Run) or each.is_artifact
    )
    return next(known, 1)


def _other_batches(given: Sequence[Run | Subject], batch: int) -> list[str]:
    """What was optimized for queries of another size than it is measured with."""
    from optc.bench.run import Run
    from optc.cli.targets import queries_of

    others = [each for each in given if not isinstance(each, Run) and each.is_artifact and each.batch != batch]
    return [
        f"{each.name} is optimized for {queries_of(each.batch)}, not for {queries_of(batch)} as here" for each in others
    ]


def _saved(name: str) -> Run | None:
    """The run that a name stands for: its file, or the folder with it; ``None`` for a target to be measured."""
    from optc.bench.run import RUN_FILE, read_run

    path = Path(name)
    if (path / RUN_FILE).is_file():
        return replace(read_run(path / RUN_FILE), name=name)
    return read_run(path) if name.endswith(".json") and not path.is_dir() else None


def _measured(subjects: list[Subject], target: Target, progress: Progress) -> tuple[list[Contender], tuple[str, ...]]:
    """The subjects' fastest candidates, all candidates measured in turns, each opened anew for each of its blocks; and
    what is to be known of all of them.
    """
    from optc.bench.compare import contender
    from optc.bench.measure import measure

    if not subjects:
        return [], ()
    groups = [subject.candidates(target.batch) for subject in subjects]
    candidates = [candidate for group in groups for candidate in group]
    with progress.step("Measuring in turns with MLPerf LoadGen") as step:
        measurement = measure(
            candidates,
            [],
            target,
            blocks=ROUNDS,
            block_seconds=BLOCK_SECONDS,
            limit_seconds=LIMIT_SECONDS,
            reopen=True,
            progress=step.update,
        )
    results, found = iter(measurement.results), []
    for subject, group in zip(subjects, groups, strict=True):
        found.append(contender(subject.name, [next(results) for _ in group]))
    return found, measurement.warnings
