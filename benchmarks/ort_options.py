"""The options of the backend onnxruntime: the defaults against each other setting, model by model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import Result, publish, say

import optc
from optc import Runner, Target
from optc.bench.measure import measure
from optc.bench.results import Candidate, CandidateResult
from optc.bench.statistics import Ratio, ratio_of_medians
from optc.frontend.load import load_model
from optc.lowering.artifact import load_artifact
from optc.lowering.backend import Array

MODELS = ("alexnet", "resnet18", "mobilenetv3_small_100", "vit_tiny_patch16_224")
PASSES = {"fp32": "fuse", "int8": "fuse,quant"}
BLOCKS, BLOCK_SECONDS = 10, 0.4
MARGIN = 1.03
IDLE_SECONDS = 0.2
DEFAULT = "as optc runs it"


VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    "io_binding": {"io_binding": True},
    "spin_us=0": {"spin_us": 0},
    "spin_us=50000": {"spin_us": 50_000},
    "optimization=extended": {"optimization": "extended"},
    "optimization=layout": {"optimization": "layout"},
    "1 thread": {},
}
"""By name: options of the backend that are not at their defaults."""


def candidates(artifact: Path, kind: str, target: Target) -> list[Candidate]:
    """One for each setting."""
    made = load_artifact(artifact)

    def opener(name: str) -> Callable[[], Runner]:
        threads = 1 if name == "1 thread" else target.threads
        return lambda: made.runner(replace(target, threads=threads, options={"onnxruntime": VARIANTS[name]}))

    return [Candidate(name, kind, kind == "int8", opener(name)) for name in VARIANTS]


def idle_cpu_ms(candidate: Candidate, query: Array) -> float:
    """CPU time that the process uses after a call, while it does nothing."""
    runner = candidate.open()
    for _ in range(3):
        runner(query)
    before = time.process_time()
    time.sleep(IDLE_SECONDS)
    spent = (time.process_time() - before) * 1e3
    runner.close()
    return spent


def benchmark() -> Result:
    """All settings of a model in turns, the same file, inputs and threads."""
    target = Target()
    table: list[dict[str, str | float]] = []
    raw, lost = {}, []
    for model in MODELS:
        loaded = load_model(model, weights="random")
        torch.manual_seed(0)
        images = torch.randn(8, *loaded.example_inputs[0].shape[1:])
        for kind, passes in PASSES.items():
            say(f"{model} {kind}")
            optimized = optc.optimize(
                loaded.module, loaded.example_inputs, passes, calibration=[images], backend="onnxruntime",
                measure=False, target=target,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                artifact = optimized.save(Path(folder) / model)
                tried = candidates(artifact, kind, target)
                query = images[:1].numpy()
                time.sleep(1)  # PyTorch's own workers spin for a while after the last call
                idle = {each.name: idle_cpu_ms(each, query) for each in tried}
                measured = measure(tried, [(query,)], target, reopen=True, blocks=BLOCKS, block_seconds=BLOCK_SECONDS)
            optimized.close()
            raw[f"{model} {kind}"] = measured.to_dict()
            ours = measured[DEFAULT]
            for each in tried:
                ratio = _ratio(measured[each.name], ours)
                if ratio.value * MARGIN < 1 and ratio.outcome == "faster":
                    lost.append(f"{each.name} on {model} {kind}")
                table.append(_row(f"{model} {kind}", measured[each.name], ratio, idle[each.name]))
    return Result(
        claim=f"No setting is shown to be faster at batch 1 than optc's by more than {MARGIN - 1:.0%}.",
        held=not lost,
        finding=f"faster: {', '.join(lost)}" if lost else "none is faster",
        table=table,
        raw=raw,
        notes=[
            "optc: ORT_ENABLE_ALL, all threads, spinning for 1 ms, run() on the caller's arrays",
            f"idle CPU ms: CPU time the process uses in the {IDLE_SECONDS * 1e3:.0f} ms after a call",
        ],
    )


def _ratio(result: CandidateResult, ours: CandidateResult) -> Ratio:
    if result.error:
        raise SystemExit(f"{result.name}: {result.error}")
    return ratio_of_medians(result.latencies_ns, ours.latencies_ns, interleaved=True)


def _row(model: str, result: CandidateResult, ratio: Ratio, idle: float) -> dict[str, str | float]:
    assert result.percentiles is not None
    return {
        "model": model,
        "setting": result.name,
        "p50 ms": result.percentiles.p50_ns / 1e6,
        "p99 ms": result.percentiles.p99_ns / 1e6,
        "ratio to optc's": "" if result.name == DEFAULT else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        "idle CPU ms": round(idle, 1),
    }


if __name__ == "__main__":
    publish("ort_options", benchmark)
