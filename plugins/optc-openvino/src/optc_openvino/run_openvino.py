"""Runs this model with openvino and numpy alone: ``python run.py [input.npy ...]``, or ``from run import load``."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # so OpenVINO does not report its import
import openvino  # noqa: E402

MODEL = "model.xml"
HINT = "LATENCY"
"""LATENCY: all threads for one query at a time; THROUGHPUT: several, by openvino.AsyncInferQueue."""
STREAMS = 1
"""With LATENCY: into how many parts a batch is divided that run side by side, where it can be."""

PARTITIONER = "DEFAULT"
"""STATIC: each thread gets an equal part of an operator's work; AUTO: in smaller parts, as it gets free."""


def missing_instructions() -> list[str]:
    """What this CPU lacks of what int8 was checked with: other outputs, not only slower. Only Linux on x86 tells."""
    manifest, cpu = Path(__file__).resolve().with_name("manifest.json"), Path("/proc/cpuinfo")
    if not manifest.exists():  # the files were taken out of their folder
        return []
    flags = re.search(r"^flags\s*:(.*)$", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    required = json.loads(manifest.read_text())["required_isa"]
    missing = [each for each in required if flags and not set(each.split("|")).intersection(flags[1].split())]
    return [each.replace("|", " or ") for each in missing]


def load(batch: int = 1, threads: int = 0) -> openvino.CompiledModel:
    """The model compiled by openvino for a part of the batch, in the types the file has; 0 threads lets it choose."""
    if missing := missing_instructions():
        sys.exit(f"the model was made for a CPU with {', '.join(missing)}: optimize it again here")
    parts = math.gcd(STREAMS, batch)
    core = openvino.Core()
    folder = Path(__file__).resolve().parent
    model = core.read_model(folder / MODEL, folder / "model.bin")
    bf16 = model.has_rt_info(["optc", "inference_precision"])
    bf16 = bf16 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {"PERFORMANCE_HINT": HINT, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64, "ENABLE_CPU_PINNING": False}
    options["INFERENCE_PRECISION_HINT"] = "bf16" if bf16 else "f32"
    if HINT == "LATENCY":
        options["NUM_STREAMS"] = parts
    if PARTITIONER != "DEFAULT":
        options["TBB_PARTITIONER"] = PARTITIONER
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    rows = batch // parts
    model.reshape({i: [rows if d.is_dynamic else d for d in p.partial_shape] for i, p in enumerate(model.inputs)})
    return core.compile_model(model, "CPU", options)


def run(model: openvino.CompiledModel, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs for one batch, whose parts run side by side."""
    count = math.gcd(STREAMS, len(arrays[0]))
    if count == 1:
        return list(model(arrays).values())
    requests = [model.create_infer_request() for _ in range(count)]
    for request, *part in zip(requests, *(np.split(array, count) for array in arrays), strict=True):
        request.start_async(part)
    for request in requests:
        request.wait()
    results = [[tensor.data for tensor in request.output_tensors] for request in requests]
    return [np.concatenate(parts) for parts in zip(*results, strict=True)]


def main(files: list[str]) -> None:
    """Run float32 ``.npy`` files of shape (batch, …), one per input, and print each sample's five largest outputs.

    Without a file, run zeros and print the outputs' shapes only.
    """
    arrays = [np.load(file, allow_pickle=False) for file in files]
    batch = arrays[0].shape[0] if arrays and arrays[0].ndim else 1
    model = load(batch)
    if files and len(files) != len(model.inputs):
        sys.exit(f"give one .npy file for each of {', '.join(port.get_any_name() for port in model.inputs)}")
    parts = math.gcd(STREAMS, batch)
    arrays = arrays or [np.zeros(port.shape, port.get_element_type().to_dtype()) for port in model.inputs]
    for port, array in zip(model.inputs, arrays, strict=True):
        if array.shape != (shape := (port.shape[0] * parts, *port.shape[1:])):
            sys.exit(f"input {port.get_any_name()} has the shape {array.shape}, the model takes {shape}")
    for port, output in zip(model.outputs, run(model, arrays), strict=True):
        print(f"{port.get_any_name()} shape: {output.shape}")
        for row in output.reshape(len(output), -1) if files and output.ndim else ():
            top = np.argsort(row)[::-1][:5]
            print("top 5:", ", ".join(f"{i}: {row[i]:.4f}" for i in top))


if __name__ == "__main__":
    main(sys.argv[1:])
