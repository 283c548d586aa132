"""optc beside its peers: the same models, inputs and threads, in one run, in interleaved blocks.

``python benchmarks/peers.py`` measures every row; ``--short`` two of them, for ``make bench``. With ``--models`` and
``--batch`` some rows are measured now; the table has those measured before as well, on other machines too, with the
versions that are installed and as many cores. A row is one run on one machine, which it names.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Result, commit, publish, say, write
from peers_summary import LEAST_SQNR_DB, MODELS, RECIPES, known_rows, row_markdown, short_name, summary
from tools import AUTO, PEERS, is_optc
from tools.peer import Task
from tools.produce import Production, produce

from optc import Runner, Target
from optc.bench.measure import measure
from optc.bench.results import Candidate, Measurement
from optc.bench.statistics import Ratio, ratio_of_medians
from optc.errors import one_line
from optc.lowering.backend import Array
from optc.lowering.torch_memory import keep_freed_memory
from optc.machine import machine
from optc.threads import available_threads

BATCHES = (1, 16)
SHORT_MODELS, SHORT_BATCHES, SHORT_BLOCKS = ("alexnet", "mobilenetv3_large_100"), (1,), 5
IMAGES, BLOCK_SECONDS, ROW_SECONDS = 32, 0.5, 900.0
BLOCKS = len(PEERS)
"""Each tool has each place in the order of a round once."""
FINAL_SECONDS, FINAL_NEAR = 300.0, 1.1
"""optc auto and the peers at most so many times slower than the best are measured again, in twice as many rounds."""
REOPENED_BYTES = 1e9
"""Models smaller than this are opened anew for each block: what is opened last in a process is slower than it would be
otherwise, by more than some of these tools differ. Larger ones take seconds to open."""


def measure_row(task: Task, names: Sequence[str], blocks: int, scratch: Path) -> dict[str, Any]:
    """Make the model with every tool, then measure what came of it side by side."""
    keep_freed_memory()  # optc's PyTorch backends set it for the process: so all have it, from the first block on
    productions: dict[str, Production] = {}
    for index, name in enumerate(names):
        say(f"{task.model}, batch {task.batch}: {name}")
        productions[name] = produce(name, task, scratch / str(index))
        if productions[name].error:
            say(f"  {productions[name].error}")
    module = task.loaded.module
    with torch.no_grad():
        reference = [module(torch.from_numpy(images)).numpy() for images in task.judged]
    made = {name: scratch / str(index) for index, name in enumerate(names) if productions[name].error is None}
    levels = {name: _sqnr_db(name, task, folder, reference) for name, folder in made.items()}
    sqnr = {name: level for name, level in levels.items() if not math.isnan(level)}
    weights = sum(parameter.numel() for parameter in module.parameters())
    candidates = [
        Candidate(
            name,
            "",
            False,
            _opener(name, task, folder),
            weights * PEERS[name].weight_bytes,
        )
        for name, folder in made.items()
    ]
    target = Target(threads=task.threads, batch=task.batch)
    options = {"block_seconds": BLOCK_SECONDS, "reopen": 4 * weights < REOPENED_BYTES}
    measured = measure(candidates, task.queries, target, **options, blocks=blocks, limit_seconds=ROW_SECONDS)
    found = row(task, productions, sqnr, measured)
    names = finalists(found)
    if len(names) > 1:
        final = [candidate for candidate in candidates if candidate.name in names]
        options |= {"blocks": 2 * blocks + 1, "limit_seconds": FINAL_SECONDS, "together": True}
        again = measure(final, task.queries, target, **options)
        found = with_finalists_again(found, measured, again)
    return found


def finalists(row: Mapping[str, Any]) -> list[str]:
    """optc auto and the peers about as fast as the best: a row's ratio hangs on these. Of large models two fit."""
    if AUTO not in row["ratios"]:
        return []
    sound = sorted((p50, name) for name, p50 in row["p50_ms"].items() if name not in row["out"] and name != AUTO)
    near = [name for p50, name in sound if p50 <= FINAL_NEAR * sound[0][0]]
    return [AUTO, *(near if row["measurement"]["interleaved"] else near[:1])]


def with_finalists_again(row: Mapping[str, Any], measured: Measurement, again: Measurement) -> dict[str, Any]:
    """A row with its finalists as measured when those alone took turns, which also says which peer is the best."""
    failed = [f"{result.name} was not measured again: {result.error}" for result in again.results if result.error]
    if failed:
        warnings = [*row["measurement"]["warnings"], *failed]
        return {**row, "measurement": {**row["measurement"], "warnings": warnings}}
    p50 = {result.name: result.percentiles.p50_ns / 1e6 for result in again.results if result.percentiles}
    best = min((name for name in p50 if not is_optc(name)), key=p50.__getitem__)
    ratios = {name: asdict(_ratio(again if name in p50 else measured, name, best)) for name in row["p50_ms"]}
    return {**row, "best_peer": best, "p50_ms": {**row["p50_ms"], **p50}, "ratios": ratios, "again": again.to_dict()}


def _opener(name: str, task: Task, folder: Path) -> Any:
    def open_() -> Runner:
        say(f"opening {name}")
        return PEERS[name].load().load(task, folder)

    return open_


def _sqnr_db(name: str, task: Task, folder: Path, reference: list[Array]) -> float:
    """What a tool's model keeps of the float32 model's outputs; NaN where it cannot be run, as measuring will tell."""
    try:
        with closing(_opener(name, task, folder)()) as runner:
            return sqnr_db(reference, [runner(images)[0] for images in task.judged])
    except Exception as error:
        say(f"  {one_line(error)}")
        return math.nan


def sqnr_db(reference: Sequence[Array], outputs: Sequence[Array]) -> float:
    """Signal to quantization noise ratio in dB: energy of the reference over that of the difference."""
    expected, got = (np.concatenate(arrays).astype(np.float64) for arrays in (reference, outputs))
    noise = float(np.square(expected - got).sum())
    return 10 * math.log10(float(np.square(expected).sum()) / noise) if noise else math.inf


def row(
    task: Task, productions: Mapping[str, Production], sqnr: Mapping[str, float], measured: Measurement
) -> dict[str, Any]:
    """All that is known of a row, as JSON has it. The reasons why a tool is out are in ``out``."""
    out = {name: made.error for name, made in productions.items() if made.error}
    p50: dict[str, float] = {}
    for result in measured.results:
        if result.error or result.percentiles is None:
            out[result.name] = result.error or "was not measured"
            continue
        p50[result.name] = result.percentiles.p50_ns / 1e6
        level = sqnr.get(result.name, math.nan)
        if not level >= LEAST_SQNR_DB:
            out[result.name] = f"output differs: {level:.1f} dB of the float32 model's"
    sound = sorted((name for name in p50 if name not in out), key=p50.__getitem__)
    best_peer = next((name for name in sound if not is_optc(name)), None)
    ratios = {}
    if best_peer is not None:
        ratios = {name: asdict(_ratio(measured, name, best_peer)) for name in p50}
    return {
        "model": task.model,
        "batch": task.batch,
        "machine": asdict(machine(gpus=False)),
        "commit": commit(),
        "recipes": RECIPES,
        "task": asdict(task),
        "best_peer": best_peer,
        "p50_ms": p50,
        "out": out,
        "ratios": ratios,
        "sqnr_db": {name: value if math.isfinite(value) else None for name, value in sqnr.items()},
        "productions": {name: asdict(made) for name, made in productions.items()},
        "measurement": measured.to_dict(),
    }


def _ratio(measured: Measurement, name: str, peer: str) -> Ratio:
    first, second = measured[name].latencies_ns, measured[peer].latencies_ns
    return ratio_of_medians(first, second, interleaved=measured.interleaved)


def benchmark(options: argparse.Namespace, folder: Path) -> Result:
    """Every row asked for, each written down as soon as it is measured; the claim is over all there are by then."""
    folder.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        for batch in options.batch:
            task = Task(model, batch, available_threads(), options.images)
            with tempfile.TemporaryDirectory(prefix="optc-peers-") as scratch:
                found = measure_row(task, options.peers, options.blocks, Path(scratch))
            del task
            gc.collect()
            stem = f"{model}-batch-{batch}-{short_name(found['machine']).replace(' ', '_')}"
            write(folder / f"{stem}.json", json.dumps(found))
            text = row_markdown(found)
            write(folder / f"{stem}.md", text)
            print(text, flush=True)
    models, batches = (SHORT_MODELS, SHORT_BATCHES) if options.short else (MODELS, BATCHES)
    return summary(known_rows(folder), len(models) * len(batches))


def main() -> None:
    """Read the command line, measure, publish."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="two models at batch 1, fewer blocks")
    parser.add_argument("--models", type=_list, help="comma-separated names")
    parser.add_argument("--batch", type=_list, help="comma-separated batch sizes")
    parser.add_argument("--peers", type=_list, default=list(PEERS), help=f"comma-separated, of: {', '.join(PEERS)}")
    parser.add_argument("--images", type=int, default=IMAGES, help="calibration images, a multiple of every batch size")
    parser.add_argument("--blocks", type=int, help="rounds of measurement")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    short = options.short
    options.models = options.models or (SHORT_MODELS if short else MODELS)
    options.batch = [int(size) for size in options.batch or (SHORT_BATCHES if short else BATCHES)]
    options.blocks = options.blocks or (SHORT_BLOCKS if short else BLOCKS)
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown or any(options.images % size for size in options.batch):
        parser.error(
            f"there is no peer {unknown[0]!r}" if unknown else "--images is not a multiple of every batch size"
        )
    os.environ["NNCF_CI"] = os.environ["HF_HUB_OFFLINE"] = "1"
    name = "peers_short" if short else "peers"
    command = "python benchmarks/peers.py" + (" --short" if short else "")
    # Without a note on the load: each row has its own.
    publish(
        name, lambda: benchmark(options, options.results / name), command=command, folder=options.results, load=False
    )


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    main()
