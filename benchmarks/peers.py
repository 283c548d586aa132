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
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Result, markdown_table, publish, say, write
from tools import AUTO, PEERS, is_optc
from tools.peer import Task
from tools.produce import Production, produce

from optc import Runner, Target
from optc.bench.measure import measure
from optc.bench.results import Candidate, Measurement
from optc.bench.statistics import Ratio, ratio_of_medians
from optc.lowering.backend import Array
from optc.lowering.torch_memory import keep_freed_memory
from optc.machine import machine
from optc.target import available_threads

MODELS = (
    "alexnet",
    "resnet50",
    "mobilenetv3_large_100",
    "convnext_tiny",
    "vit_base_patch16_224",
    "vit_huge_patch14_224",
)
BATCHES = (1, 16)
SHORT_MODELS, SHORT_BATCHES, SHORT_BLOCKS = ("alexnet", "mobilenetv3_large_100"), (1,), 5
IMAGES, BLOCK_SECONDS, ROW_SECONDS = 32, 0.5, 900.0
BLOCKS = len(PEERS)
"""Each tool has each place in the order of a round once."""
REOPENED_BYTES = 1e9
"""Models smaller than this are opened anew for each block: what is opened last in a process is slower than it would be
otherwise, by more than some of these tools differ. Larger ones take seconds to open."""
LEAST_SQNR_DB = 10.0
"""Below this a model computes something else, and being fast is no merit."""
LIMIT, LIMIT_ALEXNET, LIMIT_MEAN = 1.0, 0.9, 0.95


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
        reference = [module(torch.from_numpy(images)).numpy() for (images,) in task.queries]
    sqnr: dict[str, float] = {}
    weights = sum(parameter.numel() for parameter in module.parameters())
    candidates = [
        Candidate(
            name,
            "",
            False,
            _opener(name, task, scratch / str(index), reference, sqnr),
            weights * PEERS[name].weight_bytes,
        )
        for index, name in enumerate(names)
        if productions[name].error is None
    ]
    target = Target(threads=task.threads, batch=task.batch)
    options = {"blocks": blocks, "block_seconds": BLOCK_SECONDS, "limit_seconds": ROW_SECONDS}
    measured = measure(candidates, task.queries, target, **options, reopen=4 * weights < REOPENED_BYTES)
    found = row(task, productions, sqnr, measured)
    best = found["best_peer"]
    if not measured.interleaved and AUTO in found["ratios"]:
        # Too large for all to be in memory at once, but two fit.
        two = [candidate for candidate in candidates if candidate.name in (best, AUTO)]
        again = measure(two, task.queries, target, **options, together=True)
        found = with_the_two_again(found, again)
    return found


def with_the_two_again(row: Mapping[str, Any], again: Measurement) -> dict[str, Any]:
    """A row whose candidates did not take turns, with optc auto and the best peer as measured when those two did."""
    best = row["best_peer"]
    failed = [f"{result.name} was not measured again: {result.error}" for result in again.results if result.error]
    if failed:
        warnings = [*row["measurement"]["warnings"], *failed]
        return {**row, "measurement": {**row["measurement"], "warnings": warnings}}
    p50 = {result.name: result.percentiles.p50_ns / 1e6 for result in again.results if result.percentiles}
    ratios = {name: asdict(_ratio(again, name, best)) for name in p50}
    return {**row, "p50_ms": {**row["p50_ms"], **p50}, "ratios": {**row["ratios"], **ratios}, "again": again.to_dict()}


def _opener(name: str, task: Task, folder: Path, reference: list[Array], sqnr: dict[str, float]) -> Any:
    def open_() -> Runner:
        say(f"opening {name}")
        runner = PEERS[name].load().load(task, folder)
        sqnr[name] = sqnr_db(reference, [runner(*query)[0] for query in task.queries])
        return runner

    return open_


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
        if not sqnr[result.name] >= LEAST_SQNR_DB:
            out[result.name] = f"output differs: {sqnr[result.name]:.1f} dB of the float32 model's"
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
        "task": asdict(task),
        "keeps_freed_memory": True,
        "best_peer": best_peer,
        "p50_ms": p50,
        "out": out,
        "ratios": ratios,
        "sqnr_db": {name: value if math.isfinite(value) else None for name, value in sqnr.items()},
        "productions": {name: asdict(made) for name, made in productions.items()},
        "measurement": measured.to_dict(),
    }


def commit() -> str:
    """What is measured: the commit that is checked out, or nothing known."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _ratio(measured: Measurement, name: str, peer: str) -> Ratio:
    first, second = measured[name].latencies_ns, measured[peer].latencies_ns
    return ratio_of_medians(first, second, interleaved=measured.interleaved)


def row_markdown(row: Mapping[str, Any]) -> str:
    """One row's candidates, the fastest first, then what is out."""
    p50, out = row["p50_ms"], row["out"]
    order = [*sorted(p50, key=p50.__getitem__), *(name for name in row["productions"] if name not in p50)]
    table = []
    for name in order:
        made, sqnr = row["productions"][name], row["sqnr_db"].get(name)
        table.append(
            {
                "candidate": name,
                "runs": next((f"{r['provider']}: {r['precision']}" for r in _results(row) if r["name"] == name), "–"),
                "p50 ms": p50.get(name, "–"),
                "/ best peer": ratio_text(row["ratios"].get(name)),
                "SQNR dB": "–" if name not in row["sqnr_db"] else "exact" if sqnr is None else f"{sqnr:.1f}",
                "made in s": "–" if made["seconds"] is None else f"{made['seconds']:.1f}",
                "peak GiB": f"{made['peak_bytes'] / 2**30:.2f}",
                "out of the comparison": out.get(name, ""),
            }
        )
    how = "" if row["measurement"]["interleaved"] else f"Not interleaved: {row['measurement']['sequential_reason']}."
    if "again" in row:
        how += f" {AUTO} and {row['best_peer']} were measured again, interleaved."
    warnings = [f"- {warning}" for warning in row["measurement"]["warnings"]]
    title = f"## {row['model']}, batch {row['batch']}: best peer {row['best_peer'] or 'none'}"
    return "\n".join([title, "", *markdown_table(table), "", *([how] if how else []), *warnings]).rstrip() + "\n"


def _results(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = row["measurement"]["results"]
    return results


def ratio_text(ratio: Mapping[str, Any] | None) -> str:
    """A ratio with its confidence interval."""
    return "–" if ratio is None else f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def summary(rows: Sequence[Mapping[str, Any]], wanted: int) -> Result:
    """The claim over all rows, with what each tool took to make the model.

    Args:
        wanted: how many pairs of model and batch it is about; one may have rows of several machines.
    """
    pairs = [(row["model"], row["batch"]) for row in rows]
    names = [
        f"{model} batch {batch}" + (f" on {_short(row['machine'])}" if pairs.count((model, batch)) > 1 else "")
        for row, (model, batch) in zip(rows, pairs, strict=True)
    ]
    ratios = {
        name: None if AUTO in row["out"] else row["ratios"].get(AUTO) for name, row in zip(names, rows, strict=True)
    }
    limits = {name: LIMIT_ALEXNET if pair == ("alexnet", 1) else LIMIT for name, pair in zip(names, pairs, strict=True)}
    values = [ratio["value"] for ratio in ratios.values() if ratio]
    mean = _geometric_mean(values)
    missed = [name for name, ratio in ratios.items() if not ratio or ratio["value"] > limits[name]]
    older = [row for row in rows if not row.get("keeps_freed_memory")]
    slower = [name for name, ratio in ratios.items() if ratio and ratio["low"] > 1]
    unsure = [name for name, ratio in ratios.items() if ratio and ratio["low"] <= 1 <= ratio["high"]]
    finding = f"geometric mean {mean:.3f} over {len(values)} rows of {len(set(pairs))} of {wanted} models and batches"
    finding += f", {len(missed)} missed"
    if missed:
        finding += f" ({', '.join(f'{name}: {ratio_text(ratios[name])}' for name in missed)})"
    finding += f"; shown to be slower on {', '.join(slower) or 'none'}, the interval contains 1 on {len(unsure)}"
    return Result(
        claim=(
            f"optc's median latency over the best peer's is at most {LIMIT:.1f} on every row,"
            f" {LIMIT_ALEXNET} on AlexNet at batch 1, {LIMIT_MEAN} in geometric mean."
        ),
        held=not missed and mean <= LIMIT_MEAN and len(set(pairs)) >= wanted,
        finding=finding,
        table=[_summary_row(row) for row in rows],
        raw={"ratios": ratios},
        notes=[
            (
                "optc auto is `--passes auto --backend auto`: the fastest of int8, bf16, float32 and each layer's own"
                " fastest format, on any backend here."
            ),
            "Each row is one run on one machine; a row measured again there takes the place of what was known of it.",
            (
                "optc keeps freed memory in the process where it runs PyTorch, so here all tools have that, but for"
                f" {len(older)} rows that were measured before."
            ),
            *_by_machine(rows, list(ratios.values()), [name in missed for name in names]),
            f"Random weights; a tool whose outputs keep less than {LEAST_SQNR_DB:.0f} dB is not compared with.",
            *(f"{name}: {text}" for name, row in zip(names, rows, strict=True) for text in _left_out(row)),
        ],
        measured_on=f"{machines} machines, see its table" if (machines := len(set(_wheres(rows)))) > 1 else "",
    )


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values)))) if values else math.inf


def _by_machine(
    rows: Sequence[Mapping[str, Any]], ratios: Sequence[Mapping[str, Any] | None], missed: Sequence[bool]
) -> list[str]:
    """What was found on each machine, whose rows are of about the same time, one line each."""
    lines = []
    for machine_ in dict.fromkeys(_wheres(rows)):
        here = [number for number, row in enumerate(rows) if _where(row["machine"]) == machine_]
        values = [ratio["value"] for number in here if (ratio := ratios[number])]
        names = [f"{rows[number]['model']} batch {rows[number]['batch']}" for number in here if missed[number]]
        missing = f"missed: {', '.join(names)}" if names else "none missed"
        lines.append(f"{machine_}: geometric mean {_geometric_mean(values):.3f} over {len(here)} rows, {missing}")
    return lines


def _left_out(row: Mapping[str, Any]) -> list[str]:
    """What a row's comparison is without, by reason, with the latency where there is one."""
    tools: dict[str, list[str]] = {}
    for tool, why in row["out"].items():
        taken = f" ({row['p50_ms'][tool]:.4g} ms)" if tool in row["p50_ms"] else ""
        tools.setdefault(why, []).append(f"{tool}{taken}")
    return [f"without {', '.join(each)}: {why}" for why, each in tools.items()]


def _summary_row(row: Mapping[str, Any]) -> dict[str, str | float]:
    best, own = row["best_peer"], row["productions"].get(AUTO, {}).get("details", {}).get("kept", "")
    seconds = {name: made["seconds"] for name, made in row["productions"].items()}
    peers = [each for name, each in seconds.items() if not is_optc(name)]
    made = [seconds.get(best), None if None in peers else sum(peers), seconds.get(AUTO)]
    return {
        "model": row["model"],
        "batch": str(row["batch"]),
        "on": _where(row["machine"]),
        "commit": row.get("commit") or "not noted",
        "best peer": best or "–",
        "its p50 ms": row["p50_ms"].get(best, "–"),
        "optc auto p50 ms": row["p50_ms"].get(AUTO, "–"),
        "ratio": ratio_text(row["ratios"].get(AUTO)),
        "SQNR dB (best peer / optc)": " / ".join(_decibels(row["sqnr_db"], name) for name in (best, AUTO)),
        "optc auto kept": own or "–",
        "made in s (best peer / all peers / optc)": " / ".join("–" if each is None else f"{each:.0f}" for each in made),
    }


def _decibels(sqnr: Mapping[str, float | None], name: str | None) -> str:
    value = sqnr.get(name or "", math.nan)
    return "exact" if value is None else "–" if math.isnan(value) else f"{value:.1f}"


def _wheres(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [_where(row["machine"]) for row in rows]


def _where(of: Mapping[str, Any]) -> str:
    return f"{of['cpu']} ({_isa(of)})"


def _isa(of: Mapping[str, Any]) -> str:
    """A CPU's widest instructions for small types."""
    return str((of["isa"] or ["unknown_isa"])[-1])


def _short(of: Mapping[str, Any]) -> str:
    """A CPU by its widest instructions and its family and model, where they are known: clouds hide its name."""
    numbers = re.search(r"family \d+ model \d+", of["cpu"])
    return f"{_isa(of)} {numbers[0]}" if numbers else _isa(of)


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
            stem = f"{model}-batch-{batch}-{_short(found['machine']).replace(' ', '_')}"
            write(folder / f"{stem}.json", json.dumps(found))
            text = row_markdown(found)
            write(folder / f"{stem}.md", text)
            print(text, flush=True)
    models, batches = (SHORT_MODELS, SHORT_BATCHES) if options.short else (MODELS, BATCHES)
    return summary(known_rows(folder), len(models) * len(batches))


def known_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows in a folder that were measured with the versions installed here, in the table's order."""
    here = _versions(json.loads(json.dumps(asdict(machine(gpus=False)))))
    rows = [json.loads(path.read_text()) for path in folder.glob("*-batch-*.json")]
    rows = [row for row in rows if _versions(row["machine"]) == here]
    place = {model: number for number, model in enumerate(MODELS)}
    return sorted(
        rows, key=lambda row: (place.get(row["model"], len(place)), row["model"], row["batch"], _short(row["machine"]))
    )


def _versions(of: Mapping[str, Any]) -> list[Any]:
    return [of[key] for key in ("cores", "python", "packages")]


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
    publish(name, lambda: benchmark(options, options.results / name), command=command, folder=options.results)


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


if __name__ == "__main__":
    main()
