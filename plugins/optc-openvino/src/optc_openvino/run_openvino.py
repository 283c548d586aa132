"""Runs this model with openvino and numpy alone: ``python run.py [input.npy ...]``, or ``from run import load``."""

import sys
from pathlib import Path

import numpy as np

sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # so OpenVINO does not report its import
import openvino  # noqa: E402

HINT = "LATENCY"
"""LATENCY: all threads for one query at a time; THROUGHPUT: several, by openvino.AsyncInferQueue."""


def load(batch: int = 1, threads: int = 0) -> openvino.CompiledModel:
    """The model compiled by openvino for one batch size, in the types the file has; 0 threads lets openvino choose."""
    core = openvino.Core()
    model = core.read_model(Path(__file__).resolve().with_name("model.xml"))
    bf16 = model.has_rt_info(["optc", "inference_precision"])
    bf16 = bf16 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    options = {"PERFORMANCE_HINT": HINT, "DYNAMIC_QUANTIZATION_GROUP_SIZE": 64}
    options["INFERENCE_PRECISION_HINT"] = "bf16" if bf16 else "f32"
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    model.reshape({i: [batch if d.is_dynamic else d for d in p.partial_shape] for i, p in enumerate(model.inputs)})
    return core.compile_model(model, "CPU", options)


def main(files: list[str]) -> None:
    """Run float32 ``.npy`` files of shape (batch, …), one per input, and print each sample's five largest outputs.

    Without a file, run zeros and print the outputs' shapes only.
    """
    arrays = [np.load(file, allow_pickle=False) for file in files]
    model = load(batch=len(arrays[0]) if arrays else 1)
    if files and len(files) != len(model.inputs):
        sys.exit(f"give one .npy file for each of {', '.join(port.get_any_name() for port in model.inputs)}")
    arrays = arrays or [np.zeros(port.shape, np.float32) for port in model.inputs]
    for port, output in model(arrays).items():
        print(f"{port.get_any_name()} shape: {output.shape}")
        for row in output.reshape(len(output), -1) if files else ():
            top = np.argsort(row)[::-1][:5]
            print("top 5:", ", ".join(f"{i}: {row[i]:.4f}" for i in top))


if __name__ == "__main__":
    main(sys.argv[1:])
