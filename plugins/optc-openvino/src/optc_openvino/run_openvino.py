"""Runs this model with openvino and numpy alone: ``python run.py [input.npy ...]``, or ``from run import load``."""

import math
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


def load(batch: int = 1, threads: int = 0) -> openvino.CompiledModel:
    """The model compiled by openvino for a part of the batch, in the types the file has; 0 threads lets it choose."""
    parts = math.gcd(STREAMS, batch)
    core = openvino.Core()
    folder = Path(__file__).resolve().parent
    model = core.read_model(folder / MODEL, folder / "model.bin")
    bf16 = model.has_rt_info(["optc", "inference_precision"])
    bf16 = bf16 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {"PERFORMANCE_HINT": HINT, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}
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
    count = len(arrays[0]) // model.input(0).shape[0]
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
    model = load(batch=len(arrays[0]) if arrays else 1)
    if files and len(files) != len(model.inputs):
        sys.exit(f"give one .npy file for each of {', '.join(port.get_any_name() for port in model.inputs)}")
    arrays = arrays or [np.zeros(port.shape, np.float32) for port in model.inputs]
    for port, output in zip(model.outputs, run(model, arrays), strict=True):
        print(f"{port.get_any_name()} shape: {output.shape}")
        for row in output.reshape(len(output), -1) if files else ():
            top = np.argsort(row)[::-1][:5]
            print("top 5:", ", ".join(f"{i}: {row[i]:.4f}" for i in top))


if __name__ == "__main__":
    main(sys.argv[1:])
