"""PyTorch with freed memory kept for the next call, as optc runs it, against glibc's defaults."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import Result, publish, say

import optc
from optc import Target
from optc.bench.statistics import Ratio, ratio_of_medians
from optc.frontend.load import load_model
from optc.lowering.artifact import load_artifact

MODELS, BATCHES = ("resnet50", "convnext_tiny"), (1, 16)
BACKENDS = {"eager": "fuse", "inductor": "fuse,quant"}
ROUNDS, SECONDS, WARM_UP = 6, 1.5, 4
MARGIN = 1.03


def call(artifact: Path, backend: str, batch: int, keep: bool) -> dict[str, Any]:
    """Call an artifact in this process for a while: nanoseconds of each call, and page faults per call."""
    runner = load_artifact(artifact).runner(Target(batch=batch, options={backend: {"keep_memory": keep}}))
    image = torch.zeros(batch, 3, 224, 224).numpy()
    for _ in range(WARM_UP):
        runner(image)
    taken: list[int] = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    while sum(taken) < SECONDS * 1e9:
        start = time.perf_counter_ns()
        runner(image)
        taken.append(time.perf_counter_ns() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return {"latencies_ns": taken, "faults": faults / len(taken), "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    """Not ``ru_maxrss``, which a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


def blocks(artifact: Path, backend: str, batch: int) -> dict[bool, list[dict[str, Any]]]:
    """Both settings in turns, each call of :func:`call` in a process of its own: the setting holds for a process."""
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for keep, blocks in found.items():
            given = [str(artifact), backend, str(batch), json.dumps(keep)]
            done = subprocess.run([sys.executable, __file__, *given], stdout=subprocess.PIPE, check=True)
            blocks.append(json.loads(done.stdout))
    return found


def benchmark() -> Result:
    """Every model, batch and backend."""
    table, raw, lost = [], {}, []
    for model in MODELS:
        loaded = load_model(model, weights="random")
        for batch in BATCHES:
            images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0)).split(batch)
            for backend, passes in BACKENDS.items():
                name = f"{model}, batch {batch}, {backend} {passes}"
                say(name)
                made = optc.optimize(
                    loaded.module, images[0], passes, calibration=images, backend=backend,
                    measure=False, verify=False, target=Target(batch=batch),
                )  # fmt: skip
                with tempfile.TemporaryDirectory() as folder:
                    found = raw[name] = blocks(made.save(Path(folder) / "artifact"), backend, batch)
                made.close()
                kept, returned = ([each["latencies_ns"] for each in found[keep]] for keep in (True, False))
                ratio = ratio_of_medians(kept, returned, interleaved=True)
                if ratio.outcome == "slower" and ratio.value > MARGIN:
                    lost.append(name)
                table.append(_row(name, found, ratio))
    return Result(
        claim=f"Keeping freed memory is nowhere shown to be more than {MARGIN - 1:.0%} slower than glibc's defaults.",
        held=not lost,
        finding=f"slower: {', '.join(lost)}" if lost else "it is nowhere slower",
        table=table,
        raw={name: {str(keep): blocks for keep, blocks in found.items()} for name, found in raw.items()},
        notes=["Each block of calls is a process of its own; the two settings take turns."],
    )


def _row(name: str, found: dict[bool, list[dict[str, Any]]], ratio: Ratio) -> dict[str, str | float]:
    def middle(keep: bool, key: str) -> float:
        return sorted(each[key] for each in found[keep])[ROUNDS // 2]

    def p50_ms(keep: bool) -> float:
        taken = sorted(ns for each in found[keep] for ns in each["latencies_ns"])
        return taken[len(taken) // 2] / 1e6

    return {
        "model": name,
        "p50 ms, kept": p50_ms(True),
        "p50 ms, glibc's defaults": p50_ms(False),
        "ratio": f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        "page faults per call (kept / defaults)": f"{middle(True, 'faults'):,.0f} / {middle(False, 'faults'):,.0f}",
        "peak MiB (kept / defaults)": " / ".join(
            f"{middle(keep, 'peak_bytes') / 2**20:,.0f}" for keep in (True, False)
        ),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1:
        file, backend, batch, keep = sys.argv[1:]
        print(json.dumps(call(Path(file), backend, int(batch), json.loads(keep))))
    else:
        publish("torch_memory", benchmark)
