"""Runs this engine with tensorrt, torch and numpy: ``python run.py [input.npy ...]``, or ``from run import load``."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt
import torch

FOLDER = Path(__file__).resolve().parent


def facts() -> dict[str, Any]:
    """What the engine was built with and for, and its inputs."""
    found: dict[str, Any] = json.loads((FOLDER / "engine.json").read_text())
    return found


def gpu() -> str:
    """The name of the GPU there is."""
    if not torch.cuda.is_available():
        sys.exit("model.engine was built for a GPU, and this PyTorch sees none")
    return torch.cuda.get_device_name()


def load() -> Any:
    """The deserialized engine; TensorRT takes only those of its own version, built for this GPU."""
    made, here = facts(), gpu()
    if (made["tensorrt"], made["gpu"]) != (trt.__version__, here):
        sys.exit(f"built by TensorRT {made['tensorrt']} for a {made['gpu']}, this is {trt.__version__} on a {here}")
    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine((FOLDER / "model.engine").read_bytes())
    if engine is None:
        sys.exit("TensorRT cannot read model.engine")
    return engine


def run(engine: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run CUDA tensors in the order of the model's inputs and return its outputs."""
    context, stream = engine.create_execution_context(), torch.cuda.current_stream()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    taken = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    for name, tensor in zip(taken, inputs, strict=True):
        context.set_input_shape(name, tuple(tensor.shape))
        context.set_tensor_address(name, tensor.data_ptr())
    outputs = []
    given = [name for name in names if name not in taken]
    for name, value in zip(given, facts()["outputs"], strict=True):
        shape, dtype = tuple(context.get_tensor_shape(name)), getattr(torch, value["dtype"])
        outputs.append(torch.empty(shape, dtype=dtype, device="cuda"))
        context.set_tensor_address(name, outputs[-1].data_ptr())
    if not context.execute_async_v3(stream.cuda_stream):
        sys.exit("TensorRT could not run the engine")
    stream.synchronize()
    return outputs


def main(files: list[str]) -> None:
    """Run ``.npy`` files of shape (batch, …), one per input, and print each sample's five largest outputs.

    Without a file, run zeros and print the outputs' shapes only.
    """
    made = facts()
    inputs, batches = made["inputs"], made["batches"]
    if files and len(files) != len(inputs):
        sys.exit(f"give one .npy file for each of {', '.join(value['name'] for value in inputs)}")
    given = [np.load(file, allow_pickle=False) for file in files]
    batch = given[0].shape[0] if given and given[0].ndim else 1
    if batches and not batches[0] <= batch <= batches[1]:
        sys.exit(f"the engine was built for batches of {batches[0]} to {batches[1]}, not of {batch}")
    tensors = []
    for index, value in enumerate(inputs):
        shape = [batch if size is None else size for size in value["shape"]]
        array = given[index] if given else np.zeros(shape)
        if list(array.shape) != shape:
            sys.exit(f"input {value['name']} has the shape {list(array.shape)}, the model takes {shape}")
        gpu()
        tensors.append(torch.tensor(array, dtype=getattr(torch, value["dtype"]), device="cuda"))
    for index, output in enumerate(run(load(), tensors)):
        print(f"output {index} shape: {tuple(output.shape)}")
        for row in output.reshape(len(output), -1).float() if files and output.ndim else ():
            top = row.topk(min(5, len(row)))
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            print("top 5:", ", ".join(f"{place}: {value:.4f}" for place, value in pairs))


if __name__ == "__main__":
    main(sys.argv[1:])
