"""A loaded model: one compilation for the target's batch, another for all other batches once one is asked for."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optc import BackendError, Runner, Target
from optc_openvino.execution import kernels, precision
from optc_openvino.runtime import VERSION, compile_model, errors, ov

Array = NDArray[Any]


class OpenVinoRunner(Runner):
    """Runs an OpenVINO model on arrays.

    At the target's batch the model is compiled with static shapes, which lets OpenVINO fuse more. A query of another
    batch compiles it once more, with the batch left open. Provider and precision are those of the first compilation.
    """

    def __init__(self, model: ov.Model, target: Target) -> None:
        self._inputs = [(port.get_any_name(), port.get_partial_shape(), _dtype(port)) for port in model.inputs]
        self._open: ov.Model | None = model
        self._target = target
        self._lock = threading.Lock()
        fixed = _at_batch(model, target.batch) if model.is_dynamic() else model
        compiled = compile_model(fixed, target)
        self.kernels = kernels(compiled)
        self.precision = precision(self.kernels)
        self.provider = f"openvino {', '.join(compiled.get_property('EXECUTION_DEVICES'))} {VERSION}"
        shapes = tuple(tuple(port.get_shape()) for port in fixed.inputs)
        self._requests: dict[tuple[tuple[int, ...], ...] | None, ov.InferRequest] = {
            shapes: compiled.create_infer_request()
        }

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query. The inputs are not copied; the outputs are the caller's to keep.

        Raises:
            BackendError: the runner is closed, or an input has another shape or type than the model takes.
        """
        if self._open is None:
            raise BackendError("this runner is closed", "load the model again")
        self._check(inputs)
        # A tensor that shares an array's memory does not keep the array alive: these names do, until infer returns.
        arrays = [array if _shareable(array) else np.array(array, order="C") for array in inputs]
        with self._lock:
            request = self._request(tuple(array.shape for array in arrays))
            with errors("openvino cannot run the model"):
                for index, array in enumerate(arrays):
                    request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))
                request.infer()
            return tuple(tensor.data.copy() for tensor in request.output_tensors)

    def close(self) -> None:
        """Free the compiled models."""
        self._requests.clear()
        self._open = None

    def _check(self, inputs: tuple[Array, ...]) -> None:
        if len(inputs) != len(self._inputs):
            names = ", ".join(name for name, _, _ in self._inputs)
            raise BackendError(f"the model takes {len(self._inputs)} inputs ({names}), not {len(inputs)}")
        for (name, shape, dtype), array in zip(self._inputs, inputs, strict=True):
            if array.dtype != dtype:
                raise BackendError(f"input '{name}' is {array.dtype}, the model takes {dtype}", "convert the array")
            if not shape.compatible(ov.PartialShape(list(array.shape))):
                raise BackendError(f"input '{name}' has shape {array.shape}, the model takes {_readable(shape)}")

    def _request(self, shapes: tuple[tuple[int, ...], ...]) -> ov.InferRequest:
        key = shapes if shapes in self._requests else None
        if key not in self._requests:
            assert self._open is not None
            self._requests[key] = compile_model(self._open, self._target).create_infer_request()
        return self._requests[key]


def _at_batch(model: ov.Model, batch: int) -> ov.Model:
    """A copy with static shapes that shares the weights."""
    fixed = model.clone()
    shapes = {}
    for index, port in enumerate(model.inputs):
        shape = port.get_partial_shape()
        shapes[index] = ov.PartialShape([batch if size.is_dynamic else size for size in shape])
    with errors(f"openvino cannot give the model a batch of {batch}"):
        fixed.reshape(shapes)
    return fixed


def _shareable(array: Array) -> bool:
    return bool(array.flags.c_contiguous and array.flags.writeable)


def _dtype(port: ov.Output) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(port.get_element_type().to_dtype())
    return dtype


def _readable(shape: ov.PartialShape) -> str:
    return f"({', '.join('batch' if size.is_dynamic else str(size.get_length()) for size in shape)})"
