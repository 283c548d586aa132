"""``python -m optc.distributed``: what each rank runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from optc.distributed.files import run_files
from optc.distributed.rank import Place, StageRank
from optc.distributed.serve import serve
from optc.distributed.watch import Watch, done_key, tell_exception
from optc.errors import OptcError
from optc.lowering.pipeline_file import PipelineFile, read_pipeline
from optc.lowering.pipeline_ranks import COMPUTING_LIMIT, JOB_VARIABLE, TIMEOUT, TIMEOUT_VARIABLE, timeout
from optc.lowering.pipeline_runner import memory_bytes, stage_targets
from optc.target import Target

_MEETING = 60.0
"""Seconds for all ranks to come to where they meet."""


def main() -> None:
    """Run one rank; errors meant for people are one line, and exit code 2."""
    arguments = _arguments()
    if arguments.timeout is not None:
        os.environ[TIMEOUT_VARIABLE] = str(arguments.timeout)
    try:
        _check(arguments)
        description = read_pipeline(arguments.artifact)
        place, seconds = Place.here(len(description.stages)), timeout()
    except OptcError as error:  # all ranks of a host find the same
        if os.environ.get("LOCAL_RANK", "0") == "0":
            _say(error)
        sys.exit(error.exit_code)
    try:
        _run(arguments, description, place, seconds)
    except OptcError as error:
        sys.exit(error.exit_code)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node STAGES -m optc.distributed",
        description="Run a pipeline artifact, one rank for each stage; several hosts: torchrun --nnodes N ….",
    )
    parser.add_argument("artifact", type=Path, help="folder that 'optc partition' wrote; ranks read their stage only")
    parser.add_argument(
        "--input", type=Path, action="append", default=[], help=".npy with images, batch first; once for each input"
    )
    parser.add_argument("--output", type=Path, help="where the last rank writes the outputs, as .npz")
    parser.add_argument("--queries", type=int, default=5, help="without --input: batches of noise to time [default: 5]")
    parser.add_argument("--batch", type=int, help="images in a batch [default: as partitioned]")
    parser.add_argument(
        "--timeout", type=float, help=f"seconds in which all end after a rank failed [default: {TIMEOUT:g}]"
    )
    return parser.parse_args()


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what could only be ignored.

    Raises:
        OptcError: a number below 1, or an output of noise.
    """
    for name in ("batch", "queries"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise OptcError(f"--{name} {given} is too few", "give 1 or more")
    if arguments.output and not arguments.input:
        raise OptcError("--output without --input: batches of noise are timed, not kept", "give --input")


@record
def _run(arguments: argparse.Namespace, description: PipelineFile, place: Place, seconds: float) -> None:
    job = json.loads(os.environ[JOB_VARIABLE]) if JOB_VARIABLE in os.environ else None
    if job:
        target = Target(**job["target"])
    else:
        planned = Target(description.device, description.threads, arguments.batch or description.batch)
        target = stage_targets(description, planned)[place.rank]
    try:
        served, store = place.store(_MEETING, serve=True), place.store(seconds)
    except OptcError as error:
        _say(error)
        raise
    current = list[StageRank]()
    watch = Watch(
        store,
        place.rank,
        place.world,
        seconds,
        lambda: current[0].computing_since if current else None,
        COMPUTING_LIMIT,
    )
    watch.start()
    base = memory_bytes("RssAnon")
    try:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed")
        rank = StageRank(place, served, arguments.artifact, description, target)
        current.append(rank)
        if job:
            serve(rank, int(job["descriptor"]), base)
        else:
            run_files(rank, served, place, description, arguments)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            tell_exception(store, place.rank, error)
            if job:
                os._exit(1)  # all is told, and tearing Python down beside the thread that beats may abort
        raise
    watch.stop()
    dist.destroy_process_group()
    if place.own_store:  # what the others meet at goes last
        served.wait([done_key(rank) for rank in range(place.world)])
    if job:
        os._exit(0)  # whoever closed the pipeline waits, and tearing PyTorch down takes half a second


def _say(error: OptcError) -> None:
    print(f"optc.distributed: {error}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
