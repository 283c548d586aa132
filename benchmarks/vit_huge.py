"""ViT-H/14 (632 M parameters) through ``optc optimize --passes fuse``: peak memory, and whether the file runs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
from command import optimize
from common import Result, publish, say

MODEL = "vit_huge_patch14_224"
LIMIT_COPIES = 2.5
GIB = 2**30


def benchmark() -> Result:
    """The command as a user types it, measurement included, then the file it wrote in a session of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifact = folder / "artifact"
        run = optimize(
            [MODEL, "--weights", "random", "--passes", "fuse", "--backend", "onnxruntime", "-o", str(artifact)], folder
        )
        say("loading the file with onnxruntime")
        written = sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
        session = onnxruntime.InferenceSession(str(next(artifact.rglob("*.onnx"))), providers=["CPUExecutionProvider"])
        image = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
        (features,) = session.run(None, {session.get_inputs()[0].name: image})
    weights = int(run.report["model_bytes"])
    copies = run.peak_bytes / weights
    # timm's default weights of this name have no classifier: 1280 features, not 1000 classes.
    sound = features.shape == (1, 1280) and bool(np.isfinite(features).all())
    return Result(
        claim=f"{MODEL} is optimized within {LIMIT_COPIES} times its float32 weights of memory, and the file runs.",
        held=copies <= LIMIT_COPIES and sound,
        finding=f"peak {copies:.2f} times the weights, onnxruntime {'runs' if sound else 'DOES NOT RUN'} the file",
        table=[
            {"what": "float32 weights", "GiB": weights / GIB},
            {"what": "peak resident, process tree", "GiB": run.peak_bytes / GIB},
            {"what": "artifact", "GiB": written / GIB},
        ],
        raw={"resident": run.resident, "seconds": run.seconds, "report": run.report},
        notes=[f"{run.seconds:.0f} s in all: {_steps(run.report['seconds'])}"],
    )


def _steps(seconds: dict[str, float]) -> str:
    return ", ".join(f"{step} {duration:.0f} s" for step, duration in seconds.items())


if __name__ == "__main__":
    publish("vit_huge", benchmark)
