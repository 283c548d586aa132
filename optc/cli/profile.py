"""``optc profile``: the speed of models and artifacts in MLPerf's scenarios, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.text import Text

from optc.cli.options import (
    command_line,
    json_option,
    limit_options,
    print_json,
    progress_for,
    report_option,
    target_options,
    verbosity_options,
    weights_option,
)
from optc.cli.output import check_output
from optc.cli.terminal import stdout
from optc.cli.values import TEXT

if TYPE_CHECKING:
    from optc.bench.inside import Inside
    from optc.bench.settings import Scenario
    from optc.cli.profiling import Profile
    from optc.target import Target


@click.command("profile")
@click.argument("targets", nargs=-1, required=True, type=TEXT)
@click.option(
    "--scenario",
    type=click.Choice(["SingleStream", "MultiStream", "Server", "Offline", "all"], case_sensitive=False),
    default="SingleStream",
    show_default=True,
    help="MLPerf's scenario.",
)
@click.option(
    "--against",
    type=TEXT,
    default="vit_huge_patch14_224",
    show_default=True,
    metavar="MODEL",
    help="Model to compare with, measured once and remembered (your own code's each time); or none.",
)
@click.option("--data", type=TEXT, help="Measure accuracy, too: digits, or a folder of images.")
@weights_option
@click.option("--official", is_flag=True, help="MLPerf's full durations: ten minutes or more for each scenario.")
@click.option(
    "--user-conf",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Settings of the scenarios, as MLPerf's user.conf.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for profile.json and LoadGen's logs, laid out as an MLPerf submission; must not exist.",
)
@click.option("--layers", is_flag=True, help="Show each layer's time beside what this machine could do at best.")
@report_option
@limit_options
@target_options
@json_option
@verbosity_options
def command(
    targets: tuple[str, ...],
    scenario: str,
    against: str,
    data: str | None,
    weights: str,
    official: bool,
    user_conf: Path | None,
    output: Path | None,
    layers: bool,
    report: Path | None,
    cpu_affinity: str | None,
    memory_limit: str | None,
    threads: int | None,
    allow_fallback: bool,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Measure TARGETS with MLPerf LoadGen, in turns.

    A target is an artifact folder, a folder of such, or a model: a model is measured in eager float32, eager half
    precision and compiled. A scenario takes seconds, as blocks end when the median is known to 1 %; --official takes
    what MLPerf asks for.

    \b
    Examples:
      optc profile resnet50-int8
      optc profile alexnet --scenario all --against none
      optc profile alexnet-int8 --data digits --scenario Offline -o runs/alexnet
    """  # noqa: D301  (click takes a real backspace for "do not wrap")
    from optc.bench.limits import limited, parse_bytes, parse_cpus
    from optc.bench.run import RUN_FILE

    if output is not None:
        check_output(output)
    if report is not None:
        from optc.report.write import check_path

        check_path(report)
    if user_conf is not None:
        from optc.bench.settings import check_user_conf

        check_user_conf(user_conf)
    cpus = parse_cpus(cpu_affinity) if cpu_affinity else None
    memory = parse_bytes(memory_limit) if memory_limit else None
    progress = progress_for(verbose, quiet)
    with ExitStack() as stack:
        stack.enter_context(limited(cpus=cpus))
        with progress.step("Importing PyTorch"):
            from optc.bench.settings import SCENARIOS
            from optc.cli.profiling import Request, profile
            from optc.cli.targets import device_of, subjects
            from optc.data.dataset import open_dataset
            from optc.lowering.artifact import folder_written_whole
            from optc.report.report import jsonable
            from optc.target import Target
            from optc.threads import available_threads

        target = Target(threads=threads or available_threads(), allow_fallback=allow_fallback)
        every = scenario.lower() == "all"
        asked: tuple[Scenario, ...] = tuple(each for each in SCENARIOS if every or each.lower() == scenario.lower())
        limits: tuple[str, ...] = ("--threads", str(target.threads))
        limits += ("--cpu-affinity", cpu_affinity) if cpu_affinity else ()
        limits += ("--memory-limit", memory_limit) if memory_limit else ()
        folder = stack.enter_context(folder_written_whole(output)) if output is not None else None
        request = Request(
            target=target,
            scenarios=asked,
            against=against,
            dataset=open_dataset(data) if data else None,
            official=official,
            user_conf=user_conf,
            output=folder,
            commands=(command_line(),),
            limits=limits,
        )
        with limited(memory_bytes=memory):
            measured = subjects(targets, weights, target, progress)
            on_device = replace(request, target=replace(target, device=device_of(measured)))
            found = profile(measured, on_device, progress)
        insides: dict[str, Inside] = {}
        if layers or report is not None:
            with progress.step("Looking at layers and memory") as step:
                insides = {subject.name: subject.look_inside(step.update) for subject in found.subjects}
        inside = {"inside": {name: asdict(each) for name, each in insides.items()}} if insides else {}
        document = jsonable({**found.to_dict(), **inside})
        if folder is not None:
            (folder / RUN_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")
    if report is not None:
        from optc.report.measured import measured_document
        from optc.report.write import write_report

        told = measured_document(
            found.measurement,
            found.scenarios,
            insides,
            found.notes,
            [command_line()],
            found.accuracies,
            found.reference,
        )
        write_report(report, told, document)
    if as_json:
        print_json(document)
        return
    _print(found, target, output)
    if layers:
        _print_layers(insides)


def _print(found: Profile, target: Target, output: Path | None) -> None:
    from optc.report.profiled import latency_table, problems, scenario_table

    console, reference = stdout(), found.reference
    if found.measurement.results:
        accuracies = {each.name: each.top1 for each in found.accuracies if each.scenario == "SingleStream"}
        subjects = {result.name: found.subject_of(result.name) for result in found.measurement.results}
        table = latency_table(
            found.measurement,
            {name: subject.parameters for name, subject in subjects.items()},
            {name: accuracies.get(name, None if accuracies else each.accuracy) for name, each in subjects.items()},
            (reference.name, reference.result, reference.parameters) if reference else None,
            reference.ratio if reference else None,
        )
        console.print(table)
    if found.scenarios:
        console.print("", scenario_table(found.scenarios), sep="\n")
    if not found.measurement.results:
        for each in found.accuracies:
            console.print(each.sentence)
    notes = [*found.notes, *problems(found.measurement, found.scenarios)]
    if found.measurement.results and not found.accuracies:
        notes += [
            f"{each.name}: its top-1 was measured {each.accuracy_data}" for each in found.subjects if each.accuracy
        ]
    if reference is not None:
        notes += [f"the reference, {reference.name}: {warning}" for warning in reference.warnings]
    for line in dict.fromkeys(notes):
        console.print(Text(f"! {line}", style="yellow"))
    if reference is not None:
        when = reference.run.created.partition("T")[0]
        which = " with random weights, which latency does not depend on" if reference.weights == "random" else ""
        again = f"; to measure it again, delete {reference.file}" if reference.file else ""
        console.print(f"{reference.name} was measured on {when}{which}{again}", soft_wrap=True)
    console.print(_conditions(found, target))
    if output is not None:
        console.print(f"Written to {output}")


def _print_layers(insides: Mapping[str, Inside]) -> None:
    from optc.report.where import where_table

    console = stdout()
    for name, inside in insides.items():
        found = inside.layers_after or inside.layers_before
        if found is not None:
            console.print("", where_table(found, name), sep="\n")
        for reason in inside.missing:
            console.print(Text(f"! {name}: {reason}", style="yellow"))


def _conditions(found: Profile, target: Target) -> str:
    """What was in force, and what the harness costs."""
    cpus, memory = found.surroundings["cpus"], found.surroundings["memory_limit_bytes"]
    words = [f"{target.threads} thread{'s' if target.threads > 1 else ''}"]
    words += [f"on CPU {', '.join(map(str, cpus))}"] if cpus else []
    words += [f"at most {memory / 1e6:.0f} MB of memory"] if memory else []
    if found.overhead is None:
        return " ".join(words)
    harness = f"{found.overhead.loadgen_ns / 1000:.1f} µs of each latency by LoadGen's clock (null backend)"
    return f"{', '.join(words)}. Harness: {harness}, which p50, p90 and p99 are without."
