"""What runs on an NVIDIA GPU, and how fast: ``make gpu`` runs the tests that need one, then this, ending in one table.

Capture on the GPU, eager with cuDNN's fused kernels, Inductor, ONNX Runtime, TensorRT; float32, float16, bfloat16,
int8; images per second of ViT-H and ResNet-50 by batch. Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Result, publish, say, write

import optc
from optc.bench.baselines import baselines
from optc.bench.measure import measure
from optc.bench.results import Candidate, CandidateResult
from optc.data.calibration import DatasetCalibration
from optc.errors import first_line, one_line
from optc.frontend.load import LoadedModel, load_model
from optc.lowering.backend import Array, Runner
from optc.lowering.lowering import Lowering, backends, lower
from optc.passmanager.manager import build_passes
from optc.plugins.registry import registry

MODELS = ("resnet50", "vit_huge_patch14_224")
BATCHES = (1, 32, 128)
TUNED_BATCH = 32
CONFIGURATIONS = (
    ("eager", "fuse"),
    ("eager", "fuse,fp16"),
    ("inductor", "fuse"),
    ("inductor", "fuse,fp16"),
    ("inductor", "fuse,bf16"),
    ("onnxruntime", "fuse"),
    ("onnxruntime", "fuse,fp16"),
    ("onnxruntime-tensorrt", "fuse,fp16"),
    ("onnxruntime-tensorrt", "fuse,quant"),
    ("tensorrt", "fuse"),
    ("tensorrt", "fuse,fp16"),
    ("tensorrt", "fuse,bf16"),
    ("tensorrt", "fuse,quant"),
)
"""Backend and passes."""
NO_GPU = "there is no NVIDIA GPU that this PyTorch sees: nothing was run"
_NOT_RUN, _FAILED = "not run: ", "failed: "

Row = dict[str, str | int | float]


def main() -> None:
    """Run the tests that need a GPU, then the benchmark; exit with 2 where there is no GPU, 1 if something failed."""
    if not torch.cuda.is_available():
        print(NO_GPU)
        sys.exit(2)
    tests = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu"], cwd=RESULTS.parents[1], check=False)

    folder = RESULTS / "gpu"
    folder.mkdir(exist_ok=True)

    def run() -> Result:
        unfinished = folder / "unfinished.json"
        passed = tests.returncode == 0
        result = benchmark("cuda", MODELS, BATCHES, CONFIGURATIONS, tests_passed=passed, unfinished=unfinished)
        unfinished.unlink()
        return result

    publish("gpu", run, command="make gpu", folder=folder)


def benchmark(
    device: str,
    models: Sequence[str],
    batches: Sequence[int],
    configurations: Sequence[tuple[str, str]],
    *,
    tests_passed: bool = True,
    blocks: int = 5,
    unfinished: Path | None = None,
) -> Result:
    """Lower each model in each configuration, measure at each batch, and lay it all out in one table.

    What fails is a row of it, and the rest goes on.

    Args:
        configurations: pairs of backend and passes.
        tests_passed: whether the tests that need a GPU did.
        blocks: blocks of LoadGen queries for each candidate.
        unfinished: a file for what was found so far, written after each model.
    """
    table: list[Row] = []
    raw: dict[str, Any] = {"device": facts(device)}
    for model in models:
        try:
            rows, raw[model] = _model(model, device, batches, configurations, blocks)
        except Exception as error:
            rows = [_row(model, "all of it", note=f"{_FAILED}{one_line(error)}")]
        table += rows
        if unfinished is not None:
            write(unfinished, json.dumps({"table": table, "raw": raw}))
    failed = [f"{row['model']} {row['what']}: {row['note']}" for row in table if str(row["note"]).startswith(_FAILED)]
    left_out = {str(row["note"]) for row in table if str(row["note"]).startswith(_NOT_RUN)}
    if not tests_passed:
        failed.insert(0, "tests that need a GPU (see above)")
    return Result(
        claim="Everything optc lowers to on this GPU computes what the graph does, and runs.",
        held=not failed,
        finding=f"{_FAILED}{'; '.join(failed)}"
        if failed
        else "all of it did" + (", but for what was not run" * bool(left_out)),
        table=table,
        raw=raw,
        notes=[
            ", ".join(f"{name} {value}" for name, value in raw["device"].items()),
            f"An engine of tensorrt is tuned for batch {min(TUNED_BATCH, max(batches))} and takes the others.",
            "onnxruntime-tensorrt builds engines when it first gets a batch, which counts as opening.",
            "ms is the median of LoadGen SingleStream, copies from and to the host included. Random weights.",
            *sorted(left_out),
        ],
    )


def facts(device: str) -> dict[str, str]:
    """The GPU, its driver and the libraries, for the table's first note; of a CPU only the library versions."""
    found: dict[str, str] = {}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        found["GPU"] = f"{torch.cuda.get_device_name()} ({major}.{minor})"
        found["driver"] = _driver()
        found["CUDA"] = str(torch.version.cuda)
        found["cuDNN"] = str(torch.backends.cudnn.version())
    for package in ("torch", "triton", "torch-tensorrt", "tensorrt", "nvidia-modelopt", "onnxruntime-gpu"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown (no nvidia-smi)"


def _model(
    name: str, device: str, batches: Sequence[int], configurations: Sequence[tuple[str, str]], blocks: int
) -> tuple[list[Row], dict[str, Any]]:
    """The rows of one model, and the raw measurements by batch."""
    loaded = load_model(name, weights="random")
    rows = [_captured(name, loaded, device)]
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        made, problems = _lowered(loaded, device, batches, configurations, Path(folder))
        rows += [_row(name, what, note=problem) for what, problem in problems.items()]
        for batch in batches:
            say(f"{name}: measuring at batch {batch}")
            target = optc.Target(device, batch=batch)
            inputs = tuple(torch.randn(batch, *x.shape[1:], dtype=x.dtype) for x in loaded.example_inputs)
            query = tuple(x.numpy() for x in inputs)
            try:
                candidates = baselines(loaded.module, inputs, target)
                candidates += [
                    Candidate(what, item.precision, "quant" in what, partial(_opened, item, query), item.bytes)
                    for what, item in made.items()
                ]
                measurement = measure(candidates, [query], target, blocks=blocks, progress=say)
            except Exception as error:
                rows.append(_row(name, "all of it", batch, note=f"{_FAILED}{one_line(error)}"))
                continue
            raw[str(batch)] = asdict(measurement)
            rows += [_measured(name, result, batch, result.name in made) for result in measurement.results]
    return rows, raw


def _opened(item: Lowering, query: tuple[Array, ...]) -> Runner:
    """A runner that ran once: engines are built at the first query of a batch, which is to count as opening."""
    runner = item.load()
    try:
        runner(*query)
    except Exception:
        runner.close()
        raise
    return runner


def _measured(model: str, result: CandidateResult, batch: int, ours: bool) -> Row:
    """The row of a candidate. One of ``ours`` fails in any block and by any output that is not finite."""
    problem = result.error or ("; ".join(result.warnings) if ours and result.nonfinite_queries else "")
    if problem or result.percentiles is None:
        return _row(model, result.name, batch, result.precision, note=f"{_FAILED if ours else _NOT_RUN}{problem}")
    seconds = result.percentiles.p50_ns / 1e9
    return _row(model, result.name, batch, result.precision, seconds, "; ".join(result.warnings))


def _captured(name: str, loaded: LoadedModel, device: str) -> Row:
    """Capture the model on the device and compare the graph with the module there, TF32 off."""
    module = copy.deepcopy(loaded.module).to(device).eval()
    inputs = tuple(x.to(device) for x in loaded.example_inputs)
    start = time.perf_counter()
    try:
        program = optc.capture(module, inputs)
        seconds = time.perf_counter() - start
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected, output = module(*inputs), program.run(*inputs)[0]
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
    except (optc.OptcError, AssertionError, RuntimeError) as error:
        return _row(name, f"capture on {device}", note=f"{_FAILED}{first_line(error)}")
    return _row(name, f"capture on {device}", precision="float32", seconds=seconds, note="as the module computes")


def _lowered(
    loaded: LoadedModel, device: str, batches: Sequence[int], configurations: Sequence[tuple[str, str]], folder: Path
) -> tuple[dict[str, Lowering], dict[str, str]]:
    """What each configuration became, and why others did not become anything."""
    target = optc.Target(device, batch=min(TUNED_BATCH, max(batches)))
    split = registry().load("dataset", "synthetic")().split("train", loaded.info.preprocessing)
    context = optc.PassContext(target, DatasetCalibration(split, batch_size=4, batches=2))
    captured = optc.capture(loaded.module, loaded.example_inputs)
    programs: dict[str, optc.Program] = {}
    made: dict[str, Lowering] = {}
    problems: dict[str, str] = {}
    for number, (backend_name, passes) in enumerate(configurations):
        what = f"{backend_name} {passes}"
        try:
            (backend,), _ = backends(backend_name, target)
        except optc.OptcError as error:
            problems[what] = f"{_NOT_RUN}{error}"
            continue
        say(f"{loaded.info.name}: lowering to {what}")
        try:
            if passes not in programs:
                programs.clear()  # no two copies of a large model's weights at once
                programs[passes] = build_passes(passes, None)(captured, context).program
            made[what] = lower(backend, programs[passes], target, folder / str(number))
        except Exception as error:  # the others are measured all the same
            problems[what] = f"{_FAILED}{one_line(error)}"
    return made, problems


def _row(
    model: str, what: str, batch: int | str = "", precision: str = "", seconds: float | None = None, note: str = ""
) -> Row:
    rate = batch / seconds if seconds and isinstance(batch, int) else ""
    latency = "" if seconds is None else seconds * 1e3
    return {
        "model": model,
        "what": what,
        "batch": batch,
        "computes in": precision,
        "ms": latency,
        "images/s": rate,
        "note": note,
    }


if __name__ == "__main__":
    main()
