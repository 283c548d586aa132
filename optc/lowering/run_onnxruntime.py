"""Runs this model with onnxruntime and numpy alone: ``python run.py [input.npy]``, or ``from run import load``."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def load(threads: int = 0) -> onnxruntime.InferenceSession:
    """The model as an onnxruntime session; 0 threads lets onnxruntime choose."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = Path(__file__).resolve().with_name("model.onnx")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Run a float32 ``.npy`` file of shape (batch, …), or zeros without one, and print the five largest outputs."""
    session = load()
    sizes = session.get_inputs()[0].shape
    shape = [size if isinstance(size, int) else 1 for size in sizes]
    x = np.load(sys.argv[1], allow_pickle=False) if len(sys.argv) > 1 else np.zeros(shape, np.float32)
    (output, *_) = session.run(None, {session.get_inputs()[0].name: x})
    print("output shape:", output.shape)
    for row in output.reshape(len(output), -1):
        top = np.argsort(row)[::-1][:5]
        print("top 5:", ", ".join(f"{i}: {row[i]:.4f}" for i in top))


if __name__ == "__main__":
    main()
