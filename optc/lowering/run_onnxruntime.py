"""Runs this model with onnxruntime and numpy alone: ``python run.py [input.npy ...]``, or ``from run import load``."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnxruntime

PROVIDERS: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
"""Execution providers in order, with their options; onnxruntime adds the CPU's, for operators that they lack."""
OPTIMIZATION, SPIN_US = "ORT_ENABLE_ALL", 1000
"""Level of graph optimizations; microseconds that idle workers stay awake for more work, 0 for none."""


def load(threads: int = 0) -> onnxruntime.InferenceSession:
    """The model as an onnxruntime session; 0 threads lets onnxruntime choose.

    Ends the program where the first provider does not start: onnxruntime would take another and be silent about it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, OPTIMIZATION)
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if SPIN_US else "0")
    if SPIN_US:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    if PROVIDERS[0][0] != "CPUExecutionProvider" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN where they were installed with pip
    if PROVIDERS[0][0] == "TensorrtExecutionProvider" and importlib.util.find_spec("tensorrt"):
        importlib.import_module("tensorrt")  # loads its library
    model = Path(__file__).resolve().with_name("model.onnx")
    session = onnxruntime.InferenceSession(str(model), options, providers=PROVIDERS, enable_fallback=0)
    if session.get_providers()[0] != PROVIDERS[0][0]:
        sys.exit(f"{PROVIDERS[0][0]} does not start here, {session.get_providers()[0]} would run instead")
    return session


def main(files: list[str]) -> None:
    """Run float32 ``.npy`` files of shape (batch, …), one per input, and print each sample's five largest outputs.

    Without a file, run zeros and print the outputs' shapes only.
    """
    session = load()
    inputs = {value.name: [d if isinstance(d, int) else 1 for d in value.shape] for value in session.get_inputs()}
    if files and len(files) != len(inputs):
        sys.exit(f"give one .npy file for each of {', '.join(inputs)}")
    arrays = [np.load(file, allow_pickle=False) for file in files] or [np.zeros(s, np.float32) for s in inputs.values()]
    for value, output in zip(
        session.get_outputs(), session.run(None, dict(zip(inputs, arrays, strict=True))), strict=True
    ):
        print(f"{value.name} shape: {output.shape}")
        for row in output.reshape(len(output), -1) if files else ():
            top = np.argsort(row)[::-1][:5]
            print("top 5:", ", ".join(f"{i}: {row[i]:.4f}" for i in top))


if __name__ == "__main__":
    main(sys.argv[1:])
