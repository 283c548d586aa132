"""Serialized TensorRT engines: what is known of one, and the runner over TensorRT's own runtime.

The engine is the plan as TensorRT serializes it, deserialized by TensorRT and nothing else: no pickle, no TorchScript.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optc.errors import BackendError
from optc.lowering.backend import Array, Runner
from optc.lowering.inputs import check_inputs
from optc.lowering.layer_precision import layer_precision
from optc.target import Target

ENGINE, FACTS = "model.engine", "engine.json"
_FACTS = ("tensorrt", "gpu", "capability", "inputs", "outputs", "batches", "layers")


class TensorRtRunner(Runner):
    """A deserialized engine with one execution context, on a CUDA stream of its own."""

    def __init__(self, folder: Path, files: Sequence[str], target: Target) -> None:
        import tensorrt as trt

        path = folder / files[0]
        facts = read_facts(folder / files[1])
        refuse_others(path, facts, trt.__version__, *_gpu())
        self._inputs: list[dict[str, Any]] = facts["inputs"]
        self._batches: tuple[int, int] | None = tuple(facts["batches"]) if facts["batches"] else None
        self._types = [getattr(torch, entry["dtype"]) for entry in facts["outputs"]]
        # Host code in an engine stays forbidden, as it is by default (engine_host_code_allowed).
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BackendError(f"TensorRT cannot read the engine in {path.name}", "optimize the model again here")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        taken = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        given = [name for name in names if name not in taken]
        if (len(taken), len(given)) != (len(self._inputs), len(self._types)):
            raise BackendError(f"{path.name} has {len(taken)} inputs and {len(given)} outputs, not the model's")
        context = engine.create_execution_context()
        if context is None:
            raise BackendError(f"TensorRT has no memory to run {path.name}", "free GPU memory")
        self._taken, self._given = taken, given
        self._engine, self._context = engine, context
        self._stream = torch.cuda.Stream()
        self._one_at_a_time = threading.Lock()  # the context holds the addresses of one query
        self.provider = f"tensorrt {trt.__version__} (strongly typed engine, TF32 off)"
        self.precision = layer_precision(facts["layers"])

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query: arrays in the order of the model's inputs, any batch size the engine was built for.

        Raises:
            BackendError: the inputs are not the model's, the batch is outside the engine's, or TensorRT fails.
        """
        context, engine = self._context, self._engine
        if context is None or engine is None:
            raise BackendError("this runner is closed", "load the model again")
        check_inputs(inputs, self._inputs)
        check_batch(len(inputs[0]), self._batches)
        with self._one_at_a_time, torch.cuda.stream(self._stream):
            held = [_on_gpu(array, entry["dtype"]) for array, entry in zip(inputs, self._inputs, strict=True)]
            for name, tensor in zip(self._taken, held, strict=True):
                if not context.set_input_shape(name, tuple(tensor.shape)):
                    raise BackendError(f"the engine takes no input of the shape {tuple(tensor.shape)}")
                context.set_tensor_address(name, tensor.data_ptr())
            outputs = []
            for name, dtype in zip(self._given, self._types, strict=True):
                output = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
                context.set_tensor_address(name, output.data_ptr())
                outputs.append(output)
            if not context.execute_async_v3(self._stream.cuda_stream):
                raise BackendError("TensorRT could not run the engine", "its messages on stderr say why")
            return tuple(_array(output) for output in outputs)

    def close(self) -> None:
        """Free the engine and its memory on the GPU."""
        self._context = self._engine = None


def read_facts(path: Path) -> dict[str, Any]:
    """What an engine was built with and for, from the JSON file beside it.

    Raises:
        BackendError: the file is not what this backend writes.
    """
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in _FACTS if name not in facts]
    except (OSError, ValueError, TypeError) as error:
        raise BackendError(f"cannot read {path.name}: {error}", "optimize the model again") from error
    if missing:
        raise BackendError(f"{path.name} does not say {', '.join(missing)}", "optimize the model again")
    return facts


def refuse_others(path: Path, facts: Mapping[str, Any], version: str, gpu: str, capability: Sequence[int]) -> None:
    """Refuse an engine of another TensorRT or for another GPU: it is tuned kernels for the ones that made it.

    Args:
        version, gpu, capability: of the TensorRT and the GPU here.

    Raises:
        BackendError: says which differs.
    """
    again = "optimize the model again here"
    if facts["tensorrt"] != version:
        raise BackendError(f"{path.name} was built by TensorRT {facts['tensorrt']}, this is {version}", again)
    if facts["gpu"] != gpu or list(facts["capability"]) != list(capability):
        made, here = (f"{name} ({major}.{minor})" for name, (major, minor) in (
            (facts["gpu"], facts["capability"]), (gpu, capability)
        ))  # fmt: skip
        raise BackendError(f"{path.name} was built for a {made}, this GPU is a {here}", again)


def check_batch(batch: int, batches: tuple[int, int] | None) -> None:
    """Refuse a batch the engine was not built for.

    Args:
        batches: least and largest batch the engine takes; ``None`` where it is fixed by the shapes.

    Raises:
        BackendError: says what was given and what the engine takes.
    """
    if batches and not batches[0] <= batch <= batches[1]:
        raise BackendError(
            f"the engine was built for batches of {batches[0]} to {batches[1]}, not of {batch}",
            f"optimize the model with a target whose batch is {batch}",
        )


def _gpu() -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(), torch.cuda.get_device_capability()


def _on_gpu(array: Array, dtype: str) -> Tensor:
    if not (array.flags.writeable and array.flags.c_contiguous):
        array = np.array(array, order="C")
    return torch.from_numpy(array).to("cuda", getattr(torch, dtype))


def _array(tensor: Tensor) -> Array:
    """The tensor as an array once the stream is done; bfloat16, which numpy has not, as float32."""
    array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
    return array
