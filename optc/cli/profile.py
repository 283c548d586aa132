"""``optc profile``: the latency of models and artifacts, measured side by side with MLPerf LoadGen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from optc.cli.options import json_option, print_json, progress_for, target_options, verbosity_options
from optc.errors import OptcError

if TYPE_CHECKING:
    from optc.bench.results import Candidate
    from optc.lowering.backend import Array
    from optc.progress import Progress
    from optc.target import Target


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
        from optc.report.report import jsonable
        from optc.report.terminal import measurement_table
        from optc.target import Target, available_threads

    target = Target(threads=threads or available_threads(), allow_fallback=allow_fallback)
    groups: list[tuple[list[Candidate], tuple[Array, ...]]] = []
    for name in targets:
        is_artifact = Path(name).is_dir()
        groups.append(_artifact(name, target) if is_artifact else _model(name, weights, target, progress))
    shapes = {tuple(array.shape for array in query) for _, query in groups}
    if len(shapes) > 1:
        raise OptcError(f"the targets take inputs of different shapes: {sorted(shapes)}", "profile them separately")
    candidates = [candidate for group, _ in groups for candidate in group]
    with progress.step("Measuring with MLPerf LoadGen") as step:
        measurement = measure(candidates, [groups[0][1]], target, progress=step.update)
    if as_json:
        print_json(jsonable(measurement.to_dict()))
        return
    Console(highlight=False).print(measurement_table(measurement))


def _artifact(name: str, target: Target) -> tuple[list[Candidate], tuple[Array, ...]]:
    """The candidate an artifact folder makes, and a query of the shape it takes."""
    from optc.bench.results import Candidate
    from optc.lowering.artifact import load_artifact

    artifact = load_artifact(Path(name))
    candidate = Candidate(name, "", True, lambda: artifact.runner(target), artifact.bytes)
    return [candidate], artifact.example_query()


def _model(name: str, weights: str, target: Target, progress: Progress) -> tuple[list[Candidate], tuple[Array, ...]]:
    """The baselines of a model, and its example input."""
    from dataclasses import replace

    from optc.bench.baselines import baselines
    from optc.cli.model import load

    loaded, _ = load(name, weights, None, 0, progress)
    query = tuple(tensor[: target.batch] for tensor in loaded.example_inputs)
    candidates = [replace(c, name=f"{name} {c.name}") for c in baselines(loaded.module, query, target)]
    return candidates, tuple(tensor.numpy() for tensor in query)
