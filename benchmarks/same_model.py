"""A model compared with itself, a hundred times: how often ``optc compare`` would show a difference that is none."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from common import Result, publish, say

from optc import Target
from optc.bench.compare import comparisons, contender
from optc.bench.measure import measure
from optc.bench.results import Candidate
from optc.cli.compare import ROUNDS
from optc.lowering.artifact import Artifact, load_artifact

MODEL, TIMES, LEAST = "mobilenetv3_small_050", 100, 95
BLOCK_SECONDS = 0.1
"""Shorter than in ``optc compare``, so that a hundred take some twenty minutes."""


def benchmark() -> Result:
    """Compare one artifact with itself as ``optc compare`` does."""
    with tempfile.TemporaryDirectory(prefix="optc-same-model-") as folder:
        path = Path(folder) / "artifact"
        made = ("--weights", "random", "--passes", "fuse", "--backend", "onnxruntime", "--no-measure", "-q")
        command = [sys.executable, "-m", "optc.cli.main", "optimize", MODEL, *made, "-o", str(path)]
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL
        )  # leaves this process lean, so that blocks are quick
        artifact = load_artifact(path)
        found = [_once(artifact, number) for number in range(1, TIMES + 1)]
    same = sum(each["outcome"] == "no difference" for each in found)
    widths = sorted(each["high"] - each["low"] for each in found)
    return Result(
        claim=f"Of {TIMES} comparisons of a model with itself at least {LEAST} show no difference.",
        held=same >= LEAST,
        finding=f"{same} of {TIMES} show none",
        table=[
            {
                "comparisons": TIMES,
                "no difference": same,
                "faster": sum(each["outcome"] == "faster" for each in found),
                "slower": sum(each["outcome"] == "slower" for each in found),
                "median width of the 99 % interval": widths[len(widths) // 2],
            }
        ],
        raw=found,
        notes=[f"{MODEL} in onnxruntime, one thread, {ROUNDS} rounds of {BLOCK_SECONDS} s for each side"],
    )


def _once(artifact: Artifact, number: int) -> dict[str, float | str]:
    target, query = Target(threads=1), (artifact.example_query(),)
    sides = [Candidate(name, "", False, lambda: artifact.runner(target), 0, query) for name in ("one", "other")]
    measured = measure(sides, [], target, blocks=ROUNDS, block_seconds=BLOCK_SECONDS, reopen=True)
    (compared,) = comparisons([contender(result.name, [result]) for result in measured.results])
    say(f"{number}: {compared.verdict}")
    ratio = compared.ratio
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high, "outcome": ratio.outcome}


if __name__ == "__main__":
    publish("same_model", benchmark)
