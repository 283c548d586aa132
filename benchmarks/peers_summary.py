"""What is known of the rows of ``peers.py``: each as Markdown, all of a folder, and the claim over them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import Result, markdown_table
from tools import AUTO, is_optc
from tools.peer import JUDGED_IMAGES

from optc.machine import machine

RECIPES = 2
"""Raised where a peer is made or judged otherwise: rows of before are counted by themselves."""
MODELS = (
    "alexnet",
    "resnet50",
    "mobilenetv3_large_100",
    "convnext_tiny",
    "vit_base_patch16_224",
    "vit_huge_patch14_224",
)
LEAST_SQNR_DB = 10.0
"""Below this a model computes something else, and being fast is no merit."""
LIMIT, LIMIT_ALEXNET, LIMIT_MEAN = 1.0, 0.9, 0.95


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
        names = [result["name"] for result in row["again"]["results"]]
        how += f" {', '.join(names[:-1])} and {names[-1]} were measured again, in turns; the table has that."
    warnings = [f"- {warning}" for warning in (*row["measurement"]["warnings"], *_warnings_of_the_two(row))]
    title = f"## {row['model']}, batch {row['batch']}: best peer {row['best_peer'] or 'none'}"
    return "\n".join([title, "", *markdown_table(table), "", *([how] if how else []), *warnings]).rstrip() + "\n"


def _warnings_of_the_two(row: Mapping[str, Any]) -> list[str]:
    """What was odd about the measurements that make the ratio."""
    results = row["again"]["results"] if "again" in row else _results(row)
    two = [result for result in results if result["name"] in (row["best_peer"], AUTO)]
    return [f"{result['name']}: {warning}" for result in two for warning in result.get("warnings", ())]


def _results(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = row["measurement"]["results"]
    return results


def ratio_text(ratio: Mapping[str, Any] | None) -> str:
    """A ratio with its confidence interval."""
    return "–" if ratio is None else f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def summary(rows: Sequence[Mapping[str, Any]], wanted: int) -> Result:
    """The claim over all rows of the recipes that are in use, with what each tool took to make the model.

    Args:
        wanted: how many pairs of model and batch it is about; one may have rows of several machines.
    """
    before = [row for row in rows if row.get("recipes") != RECIPES]
    rows = [row for row in rows if row.get("recipes") == RECIPES]
    pairs = [(row["model"], row["batch"]) for row in rows]
    ratios = _ratios(rows)
    values = [ratio["value"] for ratio in ratios.values() if ratio]
    missed = _missed(rows)
    slower = [name for name, ratio in ratios.items() if ratio and ratio["low"] > 1]
    unsure = [name for name, ratio in ratios.items() if ratio and ratio["low"] <= 1 <= ratio["high"]]
    finding = f"{_mean_text(ratios)} of {len(set(pairs))} of {wanted} models and batches, {len(missed)} missed"
    if missed:
        finding += f" ({', '.join(f'{name}: {ratio_text(ratios[name])}' for name in missed)})"
    finding += f"; shown to be slower on {', '.join(slower) or 'none'}, the interval contains 1 on {len(unsure)}"
    if before:
        finding += f"; with earlier recipes {_mean_text(_ratios(before))}, {len(_missed(before))} missed"
    mean = _geometric_mean(values)
    return Result(
        claim=(
            f"optc's median latency over the best peer's is at most {LIMIT:.1f} on every row,"
            f" {LIMIT_ALEXNET} on AlexNet at batch 1, {LIMIT_MEAN} in geometric mean."
        ),
        held=not missed and mean <= LIMIT_MEAN and len(set(pairs)) >= wanted,
        finding=finding,
        table=[_summary_row(row) for row in rows],
        raw={"ratios": ratios, "ratios with earlier recipes": _ratios(before)},
        notes=[
            (
                "optc auto is `--passes auto --backend auto`: the fastest of int8, bf16, float32 and each layer's own"
                " fastest format, on any backend here."
            ),
            "Each row is one run on one machine; a row measured again there takes the place of what was known of it.",
            "optc keeps freed memory in the process where it runs PyTorch, so here all tools have that.",
            *_by_machine(rows),
            _quick(rows),
            (
                f"Random weights; a tool whose outputs of {JUDGED_IMAGES} images keep less than {LEAST_SQNR_DB:.0f} dB"
                " is not compared with."
            ),
            *(
                f"{name}: {text}"
                for name, row in zip(ratios, rows, strict=True)
                for text in (*_left_out(row), *_warnings_of_the_two(row))
            ),
            *([_EARLIER] if before else []),
            *(f"Earlier recipes, {line}" for line in _by_machine(before)),
            *(f"Earlier recipes, missed: {name}: {ratio_text(_ratios(before)[name])}" for name in _missed(before)),
        ],
        measured_on=f"{machines} machines, see its table" if (machines := len(set(_wheres(rows)))) > 1 else "",
    )


_EARLIER = (
    "Rows with earlier recipes are not in the table: there ONNX Runtime had S8S8 only, NNCF the performance preset"
    " only, torchao's rest was in float32, peers had 8-bit weights on CPUs without VNNI, and outputs were compared"
    " on as few as four images. Machines without family and model are some of the others, by an older name."
)


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each row's model and batch, with the machine where there are several."""
    pairs = [(row["model"], row["batch"]) for row in rows]
    return [
        f"{model} batch {batch}" + (f" on {short_name(row['machine'])}" if pairs.count((model, batch)) > 1 else "")
        for row, (model, batch) in zip(rows, pairs, strict=True)
    ]


def _ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any] | None]:
    """optc's ratio by the row's name; ``None`` where it has none or is out itself."""
    return {
        name: None if AUTO in row["out"] else row["ratios"].get(AUTO)
        for name, row in zip(_names(rows), rows, strict=True)
    }


def _missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    missed = []
    for row, (name, ratio) in zip(rows, _ratios(rows).items(), strict=True):
        limit = LIMIT_ALEXNET if (row["model"], row["batch"]) == ("alexnet", 1) else LIMIT
        if not ratio or ratio["value"] > limit:
            missed.append(name)
    return missed


def _mean_text(ratios: Mapping[str, Mapping[str, Any] | None]) -> str:
    values = [ratio["value"] for ratio in ratios.values() if ratio]
    return f"geometric mean {_geometric_mean(values):.3f} over {len(values)} rows" if values else "no rows"


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values)))) if values else math.inf


def _by_machine(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was found on each machine, one line each."""
    lines = []
    for machine_ in dict.fromkeys(_wheres(rows)):
        here = [row for row in rows if _where(row["machine"]) == machine_]
        missed = _missed(here)
        lines.append(
            f"{machine_}: {_mean_text(_ratios(here))}, {'missed: ' + ', '.join(missed) if missed else 'none missed'}"
        )
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
    made = [seconds.get(best), _all_peers(row), seconds.get(AUTO)]
    return {
        "model": row["model"],
        "batch": str(row["batch"]),
        "on": _where(row["machine"]),
        "commit": row.get("commit") or "an earlier one",
        "best peer": best or "–",
        "its p50 ms": row["p50_ms"].get(best, "–"),
        "optc auto p50 ms": row["p50_ms"].get(AUTO, "–"),
        "ratio": ratio_text(row["ratios"].get(AUTO)),
        "SQNR dB (best peer / optc)": " / ".join(_decibels(row["sqnr_db"], name) for name in (best, AUTO)),
        "optc auto kept": own or "–",
        "made in s (best peer / all peers / optc)": " / ".join("–" if each is None else f"{each:.0f}" for each in made),
    }


def _all_peers(row: Mapping[str, Any]) -> float | None:
    """Seconds that all peers took, with what they have in common, importing PyTorch and building the model, once."""
    peers = [made for name, made in row["productions"].items() if not is_optc(name) and not made.get("error")]
    if any(made["seconds"] is None for made in peers):
        return None
    common = [made["seconds"] - (made.get("own_seconds") or made["seconds"]) for made in peers]
    return sum(made["seconds"] for made in peers) - sum(common) + max(common, default=0.0)


def _quick(rows: Sequence[Mapping[str, Any]]) -> str:
    """In how many rows optc made its model no slower than all peers together, and than the best one alone."""
    autos = [row["productions"].get(AUTO, {}) for row in rows]
    own = [None if made.get("error") else made.get("seconds") for made in autos]
    best = [row["productions"].get(row["best_peer"], {}).get("seconds") for row in rows]
    counts = [
        sum(a is not None and b is not None and a <= b for a, b in zip(own, each, strict=True))
        for each in ([_all_peers(row) for row in rows], best)
    ]
    return (
        f"Making the model took optc auto, which tries what the peers are, no longer than all of them together in"
        f" {counts[0]} of {len(rows)} rows, and no longer than the best peer alone in {counts[1]}."
    )


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


def short_name(of: Mapping[str, Any]) -> str:
    """A CPU by its widest instructions and its family and model, where they are known: clouds hide its name."""
    numbers = re.search(r"family \d+ model \d+", of["cpu"])
    return f"{_isa(of)} {numbers[0]}" if numbers else _isa(of)


def known_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows in a folder that were measured with the versions installed here, in the table's order."""
    here = _versions(json.loads(json.dumps(asdict(machine(gpus=False)))))
    rows = [json.loads(path.read_text()) for path in folder.glob("*-batch-*.json")]
    rows = [row for row in rows if _versions(row["machine"]) == here]
    place = {model: number for number, model in enumerate(MODELS)}
    return sorted(
        rows,
        key=lambda row: (place.get(row["model"], len(place)), row["model"], row["batch"], short_name(row["machine"])),
    )


def _versions(of: Mapping[str, Any]) -> list[Any]:
    return [of[key] for key in ("cores", "python", "packages")]
