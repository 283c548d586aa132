"""``optc optimize``: passes over a model, proven, lowered, measured, saved."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from optc.cli.model import Data, load
from optc.cli.options import (
    command_line,
    device_option,
    json_option,
    print_json,
    progress_for,
    report_option,
    seed_option,
    target_options,
    verbosity_options,
)
from optc.cli.output import check_output
from optc.cli.terminal import stdout
from optc.cli.values import IMAGES, POINTS, TEXT
from optc.errors import UnknownNameError
from optc.plugins.registry import ELSEWHERE, registry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optc.passmanager.contract import Instrument, Pass


@click.command("optimize")
@click.argument("model", type=TEXT)
@click.option(
    "--passes",
    default="fuse,quant",
    show_default=True,
    help="Passes to run, in order, comma-separated, with options as in 'fuse,quant<observer=mse;formats=auto>'. Of"
    " several lists, separated by '|', the fastest is kept; auto stands for int8, a format for each layer, int8 with"
    " bf16 between, bf16 (on a GPU fp16) and float.",
)
@click.option(
    "-O", "assignments", multiple=True, metavar="NAME.OPTION=VALUE", help="Set an option of a pass or backend."
)
@click.option(
    "--weights", type=TEXT, default="pretrained", show_default=True, help="pretrained, random, or a checkpoint file."
)
@click.option("--data", type=TEXT, help="Dataset for calibration and accuracy: digits, or a folder of images.")
@click.option(
    "--max-drop",
    type=POINTS,
    metavar="POINTS",
    help="Most percentage points of accuracy to lose on --data; layers stay in float until it holds.",
)
@click.option(
    "--backend",
    type=TEXT,
    default="auto",
    show_default=True,
    help="Runtime to lower to (see 'optc backends'); auto: the fastest measured of all that run here.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Artifact folder to write; must not exist.  [default: MODEL-optimized, numbered if that exists]",
)
@device_option
@target_options
@click.option("--batch", type=IMAGES, default=1, show_default=True, help="Images in a query: what is optimized for.")
@seed_option
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare outputs after every pass.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Measure latency against baselines.")
@click.option("--print-after", multiple=True, metavar="PASS", help="Print the graph after a pass, or after 'all'.")
@click.option("--bisect-limit", type=click.IntRange(0), help="Run only the first N passes, numbering each.")
@report_option
@json_option
@verbosity_options
def command(
    model: str,
    passes: str,
    assignments: tuple[str, ...],
    weights: str,
    data: str | None,
    max_drop: float | None,
    backend: str,
    output: Path | None,
    device: str,
    threads: int | None,
    allow_fallback: bool,
    batch: int,
    seed: int,
    verify: bool,
    measure: bool,
    print_after: tuple[str, ...],
    bisect_limit: int | None,
    report: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Optimize MODEL: a timm or torchvision name, package.module:factory, or a .pt2 file.

    \b
    Examples:
      optc optimize alexnet
      optc optimize alexnet --weights alexnet-digits.safetensors --data digits --passes fuse,quant
      optc optimize alexnet --weights alexnet-digits.safetensors --data digits -O quant.formats=auto --max-drop 1
      optc optimize timm:resnet50 --passes fuse,quant -O quant.observer=entropy -o resnet50-int8
    """  # noqa: D301  (click takes a real backspace for "do not wrap")
    check_output(output or free_name(model))
    if report is not None:
        from optc.report.write import check_path

        check_path(report)
    progress = progress_for(verbose, quiet)
    with progress.step("Importing PyTorch"):
        from optc import api
        from optc.budget import AGREEMENT
        from optc.lowering.lowering import backends
        from optc.passmanager.alternatives import Alternatives
        from optc.passmanager.instruments import Bisect, PrintAfter
        from optc.passmanager.manager import parse_options
        from optc.target import Target
        from optc.threads import available_threads

    given = parse_options(assignments)
    elsewhere = {name for kind, name in ELSEWHERE if kind == "backend"}
    names = (registry().all("backend").keys() | elsewhere) - registry().all("pass").keys()
    of_backends = {name: given.pop(name) for name in list(given) if name in names}
    asked = Alternatives.of(passes, given)
    target = Target(device, threads or available_threads(), batch, allow_fallback, of_backends)
    backends(backend, target)  # refuses what it cannot lower to before the model is loaded
    instruments: list[Instrument] = []
    if bisect_limit is not None:
        instruments.append(Bisect(bisect_limit, lambda line: click.echo(line, err=True)))
    if print_after:
        printed = _leaves_printed(print_after, [each for passes in asked.lists.values() for each in passes.passes])
        instruments.append(PrintAfter(printed, lambda text: click.echo(text, err=True)))
    loaded, dataset = load(model, weights, data, seed, progress)
    role = Data(loaded, dataset)
    evaluate = role.metric("test", agree=max_drop is not None)
    if max_drop is not None and evaluate is not None and evaluate.name == AGREEMENT:
        progress.note(
            f"--max-drop {max_drop:g} is held as {AGREEMENT} with the unquantized model, on {evaluate.data}: "
            f"{role.no_accuracy}",
        )
    optimized = api.optimize(
        loaded.module,
        loaded.example_inputs,
        asked,
        backend=backend,
        calibration=role.calibration(),
        evaluate=evaluate,
        max_drop=max_drop,
        validate=role.metric("validation", agree=True) if max_drop is not None else None,
        verification=role.verification(),
        verify=verify,
        measure=measure,
        target=target,
        info=loaded.info,
        instruments=instruments,
        progress=progress,
    )
    path = optimized.save(output or free_name(model))
    if as_json:
        print_json({"artifact": str(path), **optimized.report.to_dict()})
    else:
        from optc.report.terminal import render

        stdout().print(render(optimized.report, path, verbose))
    if report is not None:
        from optc.batches import at_batch
        from optc.bench.inside import look_inside
        from optc.lowering.artifact import load_artifact
        from optc.report.optimized import optimized_document
        from optc.report.report import jsonable
        from optc.report.write import write_report

        with progress.step(f"Writing the report to {report}") as step:
            inputs = at_batch(loaded.example_inputs, optimized.program, batch)
            inside = look_inside(load_artifact(path), loaded.module, inputs, optimized.target, step.update)
            document = optimized_document(optimized.report, path, [command_line()], inside)
            found = {"artifact": str(path), **optimized.report.to_dict(), "inside": jsonable(asdict(inside))}
            write_report(report, document, found)


def _leaves_printed(names: Sequence[str], passes: Sequence[Pass]) -> set[str]:
    """The leaf passes after which to print, of the ``passes`` to run: the last one of a group.

    Raises:
        UnknownNameError: none of them has one of the names.
    """
    runs = [(each, leaf.name) for each in passes for leaf in each.leaves()]
    last = {"all": "all", **{leaf: leaf for _, leaf in runs}, **{each.name: leaf for each, leaf in runs}}
    for name in names:
        if name not in last:
            raise UnknownNameError("pass in --print-after", name, last, hint=f"known: {', '.join(last)}")
    return {last[name] for name in names}


def free_name(model: str) -> Path:
    """Where an artifact goes without ``-o``: ``MODEL-optimized``, numbered if that exists."""
    stem = re.sub(r"[^\w.-]+", "-", Path(model).stem if model.endswith(".pt2") else model)
    path, number = Path(f"{stem}-optimized"), 1
    while path.exists():
        number += 1
        path = Path(f"{stem}-optimized-{number}")
    return path
