"""A loaded model, compiled for one batch size at a time: the target's at once, another when it is first asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optc import BackendError, Runner, Target
from optc_openvino.execution import kernels, precision
from optc_openvino.runtime import VERSION, OpenVinoOptions, compile_model, errors, ov

Array = NDArray[Any]
Shapes = tuple[tuple[int, ...], ...]
Requests = SimpleQueue[ov.InferRequest]
"""A compilation's inference requests that no call uses."""
OTHER_BATCHES = 2
"""How many compilations are kept beside that of the target's batch. Each holds the weights in its kernels' layout."""


class OpenVinoRunner(Runner):
    """Runs an OpenVINO model on arrays.

    Every batch size gets a compilation of its own. With the batch left open OpenVINO fuses less, and a quantized
    ViT-Ti/16 that keeps 30 dB of the graph's outputs with fixed shapes kept 17 dB (OpenVINO 2026.4). Provider and
    precision are those of the compilation for the target's batch. As many calls from several threads run side by side
    as that one has inference requests; the others wait for one.

    Attributes:
        kernels: what that compilation runs.
    """

    def __init__(self, model: ov.Model, target: Target, given: OpenVinoOptions | None = None) -> None:
        self._inputs = [(port.get_any_name(), port.get_partial_shape(), _dtype(port)) for port in model.inputs]
        self._model: ov.Model | None = model
        self._target, self._given = target, given or OpenVinoOptions()
        self._lock = threading.Lock()
        self._others: OrderedDict[Shapes, Requests] = OrderedDict()
        self._outputs = range(len(model.outputs))
        self._types = tuple(dtype for _, _, dtype in self._inputs)
        self._shapes = tuple(_at_batch(shape, target.batch) for _, shape, _ in self._inputs)
        compiled = self._compile(self._shapes)
        self._requests: Requests | None = _requests(compiled)
        self.concurrency = self._requests.qsize()
        self.kernels = kernels(compiled)
        self.precision = precision(self.kernels)
        self.provider = f"openvino {', '.join(compiled.get_property('EXECUTION_DEVICES'))} {VERSION}"

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query. The inputs are not copied; the outputs are the caller's to keep.

        Raises:
            BackendError: the runner is closed, or an input has another shape or type than the model takes.
        """
        shapes = tuple(array.shape for array in inputs)
        if shapes != self._shapes or tuple(array.dtype for array in inputs) != self._types:
            self._check(inputs)
        # A tensor that shares an array's memory does not keep the array alive: these names do, until infer returns.
        arrays = [array if _shareable(array) else np.array(array, order="C") for array in inputs]
        requests = self._requests_for(shapes)
        request = requests.get()
        try:
            with errors("openvino cannot run the model"):
                for index, array in enumerate(arrays):
                    request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))
                request.infer()
            # One by one: the list of all takes 14 µs to make, a fiftieth of a small model's latency.
            return tuple(request.get_output_tensor(index).data.copy() for index in self._outputs)
        finally:
            requests.put(request)

    def close(self) -> None:
        """Free the compiled models and the weights."""
        with self._lock:
            self._others.clear()
            self._requests = self._model = None

    def _check(self, inputs: tuple[Array, ...]) -> None:
        if len(inputs) != len(self._inputs):
            names = ", ".join(name for name, _, _ in self._inputs)
            raise BackendError(f"the model takes {len(self._inputs)} inputs ({names}), not {len(inputs)}")
        for (name, shape, dtype), array in zip(self._inputs, inputs, strict=True):
            if array.dtype != dtype:
                raise BackendError(f"input '{name}' is {array.dtype}, the model takes {dtype}", "convert the array")
            if not shape.compatible(ov.PartialShape(list(array.shape))):
                raise BackendError(f"input '{name}' has shape {array.shape}, the model takes {_readable(shape)}")

    def _requests_for(self, shapes: Shapes) -> Requests:
        requests = self._requests
        if requests is None:
            raise BackendError("this runner is closed", "load the model again")
        if shapes == self._shapes:
            return requests
        with self._lock:
            if shapes not in self._others:
                while len(self._others) >= OTHER_BATCHES:
                    self._others.popitem(last=False)
                self._others[shapes] = _requests(self._compile(shapes))
            self._others.move_to_end(shapes)
            return self._others[shapes]

    def _compile(self, shapes: Shapes) -> ov.CompiledModel:
        if self._model is None:
            raise BackendError("this runner is closed", "load the model again")
        fixed = self._model.clone()  # shares the weights
        with errors(f"openvino cannot give the model inputs of shape {', '.join(map(str, shapes))}"):
            fixed.reshape({index: ov.PartialShape(list(shape)) for index, shape in enumerate(shapes)})
        return compile_model(fixed, self._target, self._given)


def _requests(compiled: ov.CompiledModel) -> Requests:
    """As many inference requests as the compiled model runs best at a time."""
    requests: Requests = SimpleQueue()
    for _ in range(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")):
        requests.put(compiled.create_infer_request())
    return requests


def _at_batch(shape: ov.PartialShape, batch: int) -> tuple[int, ...]:
    return tuple(batch if size.is_dynamic else size.get_length() for size in shape)


def _shareable(array: Array) -> bool:
    return bool(array.flags.c_contiguous and array.flags.writeable)


def _dtype(port: ov.Output) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(port.get_element_type().to_dtype())
    return dtype


def _readable(shape: ov.PartialShape) -> str:
    return f"({', '.join('batch' if size.is_dynamic else str(size.get_length()) for size in shape)})"
