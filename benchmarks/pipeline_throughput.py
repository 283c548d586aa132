"""Two stages of one thread each against one process with two threads: step time as predicted, throughput, memory."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import Result, publish, say
from torch import Tensor, nn

import optc
from optc.api import Optimized
from optc.bench.measure import measure
from optc.bench.results import Candidate
from optc.frontend.load import load_model
from optc.lowering.pipeline_runner import PipelineRunner, RankMemory
from optc.schedule import schedule
from optc.target import Target

STAGES, MICROBATCHES, BATCH = 2, 8, 8
LIMIT = 0.10
MODELS = {"vit_base_patch16_224": "float32", "vit_huge_patch14_224": "bfloat16"}
MIB = 2**20


class InBfloat16(nn.Module):
    """A model that computes in bfloat16 and takes and gives float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.bfloat16()).float()


def one(name: str, kind: str, rounds: int) -> dict[str, Any]:
    """Partition a model, run it beside the whole one, and put the figures together."""
    say(f"{name} in {kind}: capturing")
    loaded = load_model(name, "random")
    model = loaded.module if kind == "float32" else InBfloat16(loaded.module)
    target = Target(threads=STAGES, batch=BATCH)
    x = torch.randn(2, *loaded.example_inputs[0].shape[1:], generator=torch.Generator().manual_seed(0))
    options = {"partition": {"stages": STAGES, "microbatches": MICROBATCHES, "batch": BATCH}}
    say(f"{name}: partitioning and lowering")
    cut = optc.optimize(model, x, "fuse,partition", pass_options=options, backend="eager", measure=False, target=target)
    account = next(record.notes["account"] for record in cut.program.history if record.name == "partition")
    say(f"{name}: lowering the whole model")
    whole = optc.optimize(model, x, "fuse", backend="eager", measure=False, verify=False, target=target)
    query = (torch.cat([x] * (BATCH // 2)).numpy(),)
    runners: list[PipelineRunner] = []
    candidates = [
        Candidate("pipeline", kind, False, lambda: _kept(cut, runners), inputs=(query,)),
        Candidate("one process, 2 threads", kind, False, whole.load, inputs=(query,)),
        Candidate("one process, 1 thread", kind, False, lambda: _with_threads(whole, 1), inputs=(query,)),
    ]
    say(f"{name}: measuring")
    memory: list[RankMemory] = []
    measured = measure(
        candidates, [query], target, blocks=rounds, block_queries=3, limit_seconds=600, together=True,
        progress=lambda text: _look(runners, memory),
    )  # fmt: skip
    seconds = {}
    for result in measured.results:
        assert result.error is None, f"{result.name}: {result.error}"
        seconds[result.name] = [ns / 1e9 for block in result.blocks for ns in block.latencies_ns]
    bases = [rank.base_bytes for rank in runners[0].ranks]
    check = cut.details["check"]
    cut.close()
    return {"model": name, "kind": kind, "account": account, "seconds": seconds, "check": check,
            "allocated": [each.allocated_bytes for each in memory], "peaks": [each.peak_bytes for each in memory],
            "bases": bases, "weights": [row["weight_bytes"] for row in account]}  # fmt: skip


def _kept(cut: Optimized, runners: list[PipelineRunner]) -> PipelineRunner:
    runner = cut.load()
    assert isinstance(runner, PipelineRunner)
    runners.append(runner)
    return runner


def _look(runners: Sequence[PipelineRunner], memory: list[RankMemory]) -> None:
    """Memory of each rank; asked before each block, as the ranks are gone in the end."""
    if runners:
        memory[:] = runners[-1].memory()


def _with_threads(whole: Optimized, threads: int) -> Any:
    lowering = whole._lowering
    return lowering.backend.load(lowering.folder, lowering.lowered.files, Target(threads=threads, batch=BATCH))


def row(found: Mapping[str, Any]) -> dict[str, str | int | float]:
    """One line of the table."""
    account, seconds = found["account"], {name: statistics.median(each) for name, each in found["seconds"].items()}
    plan = schedule(
        [each["compute_seconds"] for each in account], [each["send_seconds"] for each in account[:-1]], MICROBATCHES
    )
    ideal = seconds["one process, 1 thread"] / STAGES / (1 - plan.ideal_bubble)
    memory = [
        f"{weights / MIB:,.0f} / {(allocated - base) / MIB:,.0f} / {peak / MIB:,.0f}"
        for weights, allocated, base, peak in zip(
            found["weights"], found["allocated"], found["bases"], found["peaks"], strict=True
        )
    ]
    return {
        "model": f"{found['model']} {found['kind']}",
        "predicted s": plan.seconds,
        "measured s": seconds["pipeline"],
        "measured/predicted": seconds["pipeline"] / plan.seconds,
        "images/s": BATCH / seconds["pipeline"],
        "ideal for the bubble": BATCH / ideal,
        "one process, 2 threads": BATCH / seconds["one process, 2 threads"],
        "bubble": f"{plan.bubble:.1%} (ideal {plan.ideal_bubble:.1%})",
        "MiB a rank": "; ".join(memory),
        "SQNR dB": found["check"]["sqnr_db"],
    }


def benchmark(models: Sequence[str], rounds: int) -> Result:
    """Every model, one after the other."""
    raw = [one(name, MODELS[name], rounds) for name in models]
    table = [row(found) for found in raw]
    ratios = {str(each["model"]): float(each["measured/predicted"]) for each in table}
    return Result(
        claim=f"A batch of {BATCH} in {MICROBATCHES} microbatches through {STAGES} stages of one thread each takes the"
        f" time that was predicted, within {LIMIT:.0%}.",
        held=all(abs(ratio - 1) <= LIMIT for ratio in ratios.values()),
        finding="; ".join(f"{name}: {ratio:.3f} of the prediction" for name, ratio in ratios.items()),
        table=table,
        raw=raw,
        notes=[
            "Predicted: GPipe's schedule over the partitioner's account, which times each node in eager PyTorch.",
            "Ideal for the bubble: all stages take half of what one process with one thread takes, transfers nothing.",
            "Memory: a rank's weights / what it allocated beyond Python and PyTorch / the most that was ever resident.",
            "SQNR: the pipeline's outputs against the unsplit graph's, the worst microbatch, when it was lowered.",
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="of " + ", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    publish("pipeline_throughput", lambda: benchmark(arguments.models.split(","), arguments.rounds))
