"""``optc profile``: the latency of models and artifacts, measured side by side with MLPerf LoadGen."""

from __future__ import annotations

import click
from rich.console import Console

from optc.cli.options import json_option, print_json, progress_for, target_options, verbosity_options


@click.command("profile")
@click.argument("targets", nargs=-1, required=True)
@click.option(
    "--weights", default="pretrained", show_default=True, help="For model names: pretrained, random or a file."
)
@target_options
@json_option
@verbosity_options
def command(
    targets: tuple[str, ...],
    weights: str,
    threads: int | None,
    allow_fallback: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Measure TARGETS in LoadGen's SingleStream scenario, in turns, at batch 1.

    A target is an artifact folder, or a model: a model is measured in eager float32, eager half precision and compiled.
    """
    progress = progress_for(verbose, quiet)
    with progress.step("Importing PyTorch"):
        from optc.bench.measure import measure
        from optc.bench.run import run_document
        from optc.bench.surroundings import surroundings
        from optc.cli.targets import subjects
        from optc.report.report import jsonable
        from optc.report.terminal import measurement_table
        from optc.target import Target, available_threads

    target = Target(threads=threads or available_threads(), allow_fallback=allow_fallback)
    candidates = [
        candidate
        for subject in subjects(targets, weights, target, progress)
        for candidate in subject.candidates(target.batch)
    ]
    with progress.step("Measuring with MLPerf LoadGen") as step:
        measurement = measure(candidates, [], target, progress=step.update)
    if as_json:
        print_json(jsonable(run_document(measurement, surroundings(target))))
        return
    Console(highlight=False).print(measurement_table(measurement))
