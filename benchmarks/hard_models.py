"""Models whose outputs other tools turn into noise by default: what int8 leaves of them there, and with optc.

Nothing is timed. Weights are random (seed 0), as where the complaint comes from: a quantizer has no say in weights.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Result, publish, say
from peers import LEAST_SQNR_DB, sqnr_db
from tools.onnx_runtime import StaticInt8Defaults
from tools.open_vino import NncfInt8
from tools.peer import JUDGED_IMAGES, Peer, Task, int8_saturates
from tools.torchao_int8 import TorchaoInt8

import optc
from optc.errors import one_line
from optc.lowering.backend import Array
from optc.target import Target
from optc.threads import available_threads

MODELS = (
    "deit3_small_patch16_224",
    "vit_base_patch16_224",
    "efficientnet_b0",
    "mixnet_s",
    "swin_tiny_patch4_window7_224",
)
TOOLS: dict[str, Peer] = {
    "onnxruntime quantize_static": StaticInt8Defaults(),
    "torchao PT2E": TorchaoInt8(),
    "openvino nncf": NncfInt8(),
}
BACKENDS = ("onnxruntime", "openvino", "inductor")
IMAGES = 32
_SATURATES = "This CPU has no VNNI: int8 kernels saturate here unless weights have 7 bits."

Row = dict[str, str | float]


def model_rows(model: str, images: int) -> list[Row]:
    """One row for each tool, and for optc on each backend."""
    task = Task(model, 1, available_threads(), images)
    module = task.loaded.module
    with torch.no_grad():
        reference = [module(torch.from_numpy(images)).numpy() for images in task.judged]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="optc-hard-models-") as scratch, contextlib.chdir(scratch):
        for number, (name, peer) in enumerate(TOOLS.items()):
            say(f"{model}: {name}")
            folder = Path(scratch, str(number))
            folder.mkdir()
            try:
                peer.produce(task, folder)
                runner = peer.load(task, folder)
                rows.append(_row(model, name, reference, [runner(images)[0] for images in task.judged]))
                runner.close()
            except Exception as error:
                rows.append({"model": model, "tool": name, "kept in float": one_line(error)})
        for backend in BACKENDS:
            say(f"{model}: optc on {backend}")
            rows.append(_optc(model, backend, task, reference))
    return rows


def _optc(model: str, backend: str, task: Task, reference: list[Array]) -> Row:
    name = f"optc int8, {backend}"
    try:
        made = optc.optimize(
            task.loaded.module,
            torch.from_numpy(task.queries[0][0]),
            "fuse,quant",
            backend=backend,
            calibration=task.calibration,
            measure=False,
            target=Target(threads=task.threads),
            info=task.loaded.info,
        )
    except optc.OptcError as error:
        return {"model": model, "tool": name, "kept in float": str(error)}
    row = _row(model, name, reference, [made(torch.from_numpy(images)).numpy() for images in task.judged])
    made.close()
    reasons = Counter(
        skip.reason.split(":")[0] for each in made.report.passes if each.name == "quant" for skip in each.skipped
    )
    kept = "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common())
    return {**row, "runs": made.report.precision, "kept in float": kept or "nothing"}


def _row(model: str, name: str, reference: list[Array], outputs: list[Array]) -> Row:
    sqnr = sqnr_db(reference, outputs)
    same = np.concatenate([a.argmax(1) == b.argmax(1) for a, b in zip(reference, outputs, strict=True)])
    return {
        "model": model,
        "tool": name,
        "SQNR dB": round(sqnr, 1),
        "relative error": round(10 ** (-sqnr / 20), 3),
        "same top-1 %": round(100 * float(same.mean())),
        "runs": "–",
        "kept in float": "–",
    }


def benchmark(models: list[str], images: int) -> Result:
    """The claim over all models; a row without an SQNR is one where no model came out, with the reason in its place."""
    found = [row for model in models for row in model_rows(model, images)]
    columns: Row = {"model": "", "tool": "", "SQNR dB": "–", "relative error": "–", "same top-1 %": "–", "runs": "–"}
    table: list[Row] = [{**columns, **row} for row in found]

    def lost(row: Row) -> bool:
        return not isinstance(row["SQNR dB"], float) or row["SQNR dB"] < LEAST_SQNR_DB

    own = [row for row in table if str(row["tool"]).startswith("optc")]
    bad = [f"{row['model']} ({row['tool']})" for row in own if lost(row)]
    others = [f"{row['model']} ({row['tool']})" for row in table if row not in own and lost(row)]
    raw: dict[str, Any] = {"images": images, "rows": found}
    return Result(
        claim=(
            "On models where int8 of other tools returns noise by default, optc's int8 keeps at least"
            f" {LEAST_SQNR_DB:.0f} dB of the outputs in each runtime, and lists what it left in float."
        ),
        held=not bad,
        finding=f"not kept on {', '.join(bad)}"
        if bad
        else f"least {min(float(row['SQNR dB']) for row in own):.1f} dB"
        + (f"; lost by others: {', '.join(others)}" if others else ""),
        table=table,
        raw=raw,
        notes=[
            f"Random weights; the same {images} synthetic images calibrate all.",
            "SQNR is of the outputs against the float32 model's; relative error is the same as a ratio of norms.",
            f"Outputs are those for {JUDGED_IMAGES} further images.",
            *([_SATURATES] if int8_saturates() else []),
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm names (default: %(default)s)")
    parser.add_argument("--images", type=int, default=IMAGES, help="calibration images (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    given = parser.parse_args()
    run = partial(benchmark, given.models, given.images)
    try:
        publish("hard_models", run, command="python benchmarks/hard_models.py", folder=given.results)
    except optc.OptcError as error:
        parser.error(str(error))
