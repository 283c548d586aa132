"""``optc partition``: a model cut into stages for pipeline parallelism, what to expect of that, and the artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

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
from optc.cli.values import DEVICES, IMAGES, STAGES, TEXT
from optc.errors import OptcError

if TYPE_CHECKING:
    from optc.cli.model import Data
    from optc.cli.terminal import TerminalProgress
    from optc.frontend.load import LoadedModel
    from optc.passmanager.manager import PassManager
    from optc.program import Program
    from optc.target import Target

PASS = "partition"


@click.command("partition")
@click.argument("model", type=TEXT)
@click.option("--stages", type=STAGES, help="Number of stages.  [default: one for each device, or 2]")
@click.option(
    "--microbatches",
    type=IMAGES,
    default=8,
    show_default=True,
    help="Parts that a batch goes through the stages in.",
)
@click.option("--batch", type=IMAGES, help="Images in a batch.  [default: one in each microbatch]")
@click.option(
    "--devices",
    type=DEVICES,
    metavar="DEVICES",
    help="4xh100, 1xh100,2xa100, 2xcpu:1 (a CPU's threads) or a TOML file.  [default: this machine's threads, shared]",
)
@click.option(
    "--simulate", type=DEVICES, metavar="DEVICES", help="Plan for devices that are not here, with random weights."
)
@click.option("--passes", default="", help="Passes to run before, in order, comma-separated, such as fuse.")
@click.option("-O", "assignments", multiple=True, metavar="PASS.OPTION=VALUE", help="Set an option of a pass.")
@click.option(
    "--weights",
    type=TEXT,
    help="pretrained, random, or a checkpoint file.  [default: pretrained; random with --simulate]",
)
@click.option(
    "--backend", type=TEXT, default="auto", show_default=True, help="Runtime to lower the stages to; auto: eager."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Artifact folder to write; must not exist.")
@device_option
@target_options
@seed_option
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare outputs after every pass; not with --simulate.",
)
@report_option
@json_option
@verbosity_options
def command(
    model: str,
    stages: int | None,
    microbatches: int,
    batch: int | None,
    devices: str | None,
    simulate: str | None,
    passes: str,
    assignments: tuple[str, ...],
    weights: str | None,
    backend: str,
    output: Path | None,
    device: str,
    threads: int | None,
    allow_fallback: bool,
    seed: int,
    verify: bool,
    report: Path | None,
    as_json: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Cut MODEL into stages that run one after the other on devices of their own.

    The slowest stage, what it hands on included, is as fast as it can be. With -o each stage is lowered and all are
    saved as one artifact for optc profile, optc compare and torchrun -m optc.distributed.

    \b
    Examples:
      optc partition vit_huge_patch14_224 --stages 2 --microbatches 8 -o vith.pipe
      optc partition vit_base_patch16_224 --devices 2xcpu:1 --passes fuse
      optc partition vit_huge_patch14_224 --simulate 64xh100 --microbatches 256
    """  # noqa: D301  (click takes a real backspace for "do not wrap")
    _check(devices, simulate, backend, output)
    if report is not None:
        from optc.report.write import check_path

        check_path(report)
    progress = progress_for(verbose, quiet)
    with progress.step("Importing PyTorch"):
        from optc.cli.model import Data, load
        from optc.lowering.lowering import backends
        from optc.passmanager.manager import build_passes, parse_options
        from optc.report.deviations import deviations
        from optc.report.stages import Prediction, render
        from optc.target import Target
        from optc.threads import available_threads

    own = {"stages": stages, "microbatches": microbatches, "batch": batch, "devices": devices or simulate}
    own |= {"simulate": True} if simulate else {}
    options: dict[str, dict[str, Any]] = dict(parse_options(assignments))
    options[PASS] = {key: value for key, value in own.items() if value is not None} | options.get(PASS, {})
    pipeline = build_passes(f"{passes},{PASS}", options)
    target = Target(device, threads or available_threads(), batch=batch or microbatches, allow_fallback=allow_fallback)
    if output is not None and backend != "auto":
        backends(backend, target)  # refuses what it cannot lower to before the model is loaded
    loaded, _ = load(model, weights or _default_weights(model, simulate), None, seed, progress)
    data = Data(loaded, None)
    lowering: dict[str, Any] = {}
    if output is None:
        program = _plan(loaded, data, pipeline, target, verify and not simulate, progress)
    else:
        program, lowering = _lower(loaded, data, pipeline, target, verify, backend, output, progress)
    prediction = Prediction.of(program.history)
    notes = list(program.info.notes)
    for note in notes[len(loaded.info.notes) :]:  # those before were told when it was loaded
        progress.note(note)
    for what, where, why in deviations(lowering, every=verbose):
        progress.note(f"{what}: {where}: {why}")
    artifact = None if output is None else str(output)
    found = {"model": loaded.info.name, "artifact": artifact, **prediction.to_dict(), "notes": notes}
    if report is not None:
        from optc.report.partitioned import partitioned_document
        from optc.report.write import write_report

        write_report(report, partitioned_document(loaded.info.name, prediction, [command_line()]), found)
    if as_json:
        print_json(found)
        return
    console = stdout()
    console.print(render(prediction))
    if output is not None:
        stages = len(prediction.account)
        run = f", or torchrun --nproc-per-node {stages} -m optc.distributed {output}" if stages > 1 else ""
        console.print(Text(f"Artifact: {output} (optc profile {output}{run})"))


def _default_weights(model: str, simulate: str | None) -> str:
    """For a simulation no download: but files and the user's own code bring their weights."""
    from optc.frontend.load import find_source

    return "random" if simulate and find_source(model)[0].name in ("timm", "torchvision") else "pretrained"


def _check(devices: str | None, simulate: str | None, backend: str, output: Path | None) -> None:
    if devices and simulate:
        raise OptcError("--devices and --simulate both name devices", "give one of them")
    if simulate and output is not None:
        raise OptcError("--simulate plans for devices that are not here, so there is nothing to lower", "leave -o away")
    if output is not None:
        check_output(output)
    elif backend != "auto":
        raise OptcError(
            f"without -o no stage is lowered, to {backend} or otherwise", "add -o FOLDER, or leave --backend away"
        )


def _plan(
    loaded: LoadedModel, data: Data, pipeline: PassManager, target: Target, verify: bool, progress: TerminalProgress
) -> Program:
    """Run the passes and lower nothing."""
    from optc.batches import Batches, as_calibration
    from optc.frontend.capture import capture
    from optc.lowering.node_times import node_times
    from optc.machine import isa, total_memory
    from optc.passmanager.contract import Instrument, PassContext
    from optc.passmanager.instruments import Statistics, Timing, Verify

    with progress.step("Capturing the graph") as step:
        captured = capture(loaded.module, loaded.example_inputs, info=loaded.info)
        step.done(f"{captured.operator_count()} operators, {captured.constant_bytes() / 1e6:.1f} MB")
    watchers: list[Instrument] = [Timing(), Statistics()]
    calibration = as_calibration(data.calibration(), captured)
    if verify:
        with progress.step("Running the captured model on verification inputs"):
            seen = data.verification() or [captured.example_inputs]
            batches = list(Batches(seen, captured, "verification")) or [captured.example_inputs]
            watch = Verify(captured, batches, Path.cwd(), PassContext(target, calibration))
            watchers.append(watch)
            for remark in watch.remarks:
                progress.note(remark)
    with progress.step("Running passes") as step:
        context = PassContext(
            target,
            calibration,
            watchers,
            progress=step.update,
            isa=isa(),
            note=lambda text: progress.note(text),
            node_times=node_times,
            memory=total_memory(),
        )
        program = pipeline(captured, context).program
        step.done(", ".join(record.name for record in program.history if record.modified))
    return program


def _lower(
    loaded: LoadedModel,
    data: Data,
    pipeline: PassManager,
    target: Target,
    verify: bool,
    backend: str,
    output: Path,
    progress: TerminalProgress,
) -> tuple[Program, dict[str, Any]]:
    """Run the passes, lower each stage and save the artifact; returns what its backend had to say as well."""
    from optc import api

    optimized = api.optimize(
        loaded.module,
        loaded.example_inputs,
        pipeline,
        backend=backend,
        calibration=data.calibration(),
        verification=data.verification(),
        verify=verify,
        measure=False,
        target=target,
        info=loaded.info,
        progress=progress,
    )
    with progress.step(f"Writing {output}"):
        optimized.save(output)
    return optimized.program, optimized.details
