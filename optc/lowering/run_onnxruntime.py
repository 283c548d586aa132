"""Runs this model with onnxruntime and numpy alone: ``python run.py [input.npy ...]``, or ``from run import load``."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime

PROVIDERS: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
"""Execution providers in order, with their options; onnxruntime adds the CPU's, for operators that they lack."""
OPTIMIZATION, SPIN_US = "ORT_ENABLE_ALL", 1000
"""Level of graph optimizations; microseconds that idle workers stay awake for more work, 0 for none."""


def missing_instructions() -> list[str]:
    """What this CPU lacks of what int8 was checked with: other outputs, not only slower. Only Linux on x86 tells."""
    manifest, cpu = Path(__file__).resolve().with_name("manifest.json"), Path("/proc/cpuinfo")
    if not manifest.exists():  # the files were taken out of their folder
        return []
    flags = re.search(r"^flags\s*:(.*)$", cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    required = json.loads(manifest.read_text())["required_isa"]
    missing = [each for each in required if flags and not set(each.split("|")).intersection(flags[1].split())]
    return [each.replace("|", " or ") for each in missing]


def load(threads: int = 0) -> onnxruntime.InferenceSession:
    """The model as an onnxruntime session; 0 threads lets onnxruntime choose.

    Ends the program where the first provider does not start: onnxruntime would take another and be silent about it.
    """
    if missing := missing_instructions():
        sys.exit(f"the model was made for a CPU with {', '.join(missing)}: optimize it again here")
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
    """Run ``.npy`` files of shape (batch, …), one per input, and print each sample's five largest outputs.

    Without a file, run zeros and print the outputs' shapes only.
    """
    session = load()
    inputs = session.get_inputs()
    if files and len(files) != len(inputs):
        sys.exit(f"give one .npy file for each of {', '.join(value.name for value in inputs)}")
    given = [np.load(file, allow_pickle=False) for file in files]
    batch, arrays = given[0].shape[0] if given and given[0].ndim else 1, {}
    for index, value in enumerate(inputs):
        name = value.type[len("tensor(") : -1]
        dtype = {"float": "float32", "double": "float64"}.get(name, name)
        shape = tuple(size if isinstance(size, int) else batch for size in value.shape)
        array = given[index] if given else np.zeros(shape)
        if array.shape != shape:
            sys.exit(f"input {value.name} has the shape {array.shape}, the model takes {shape}")
        arrays[value.name] = array.astype(dtype)
    for value, output in zip(session.get_outputs(), session.run(None, arrays), strict=True):
        print(f"{value.name} shape: {output.shape}")
        for row in output.reshape(len(output), -1) if files and output.ndim else ():
            top = np.argsort(row)[::-1][:5]
            print("top 5:", ", ".join(f"{i}: {row[i]:.4f}" for i in top))


if __name__ == "__main__":
    main(sys.argv[1:])
