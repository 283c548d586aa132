"""A loaded model, compiled for one batch size at a time: the target's at once, another when it is first asked for."""

from __future__ import annotations

import math
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
Requests = SimpleQueue[tuple[ov.InferRequest, ...]]
"""A compilation's inference requests that no call uses, as many together as a call takes."""
OTHER_BATCHES = 2
"""How many compilations are kept beside that of the target's batch. Each holds the weights in its kernels' layout."""


class OpenVinoRunner(Runner):
    """Runs an OpenVINO model on arrays.

    Every batch size gets a compilation of its own. With the batch left open OpenVINO fuses less, and a quantized
    ViT-Ti/16 that keeps 30 dB of the graph's outputs with fixed shapes kept 17 dB (OpenVINO 2026.4). Provider and
    precision are those of the compilation for the target's batch. As many calls from several threads run side by side
    as that one has inference requests; the others wait for one. With the option ``streams`` a call uses several: each
    computes a part of the batch in a stream of its own, with its part of the threads.

    Attributes:
        kernels: what that compilation runs.
        divisible: whether every input and output takes a batch of any size.
    """

    def __init__(self, model: ov.Model, target: Target, given: OpenVinoOptions | None = None) -> None:
        self._inputs = [(port.get_any_name(), port.get_partial_shape(), _dtype(port)) for port in model.inputs]
        self._model: ov.Model | None = model
        self._target, self._given = target, given or OpenVinoOptions()
        self.divisible = batch_first([*model.inputs, *model.outputs])
        self._lock = threading.Lock()
        self._others: OrderedDict[Shapes, Requests] = OrderedDict()
        self._outputs = range(len(model.outputs))
        self._types = tuple(dtype for _, _, dtype in self._inputs)
        self._shapes = tuple(at_batch(shape, target.batch) for _, shape, _ in self._inputs)
        parts = self._parts(self._shapes)
        compiled = self._compile(self._shapes, parts)
        self._requests: Requests | None = _requests(compiled, parts)
        self.concurrency = self._requests.qsize()
        self.kernels = kernels(compiled)
        self.precision = precision(self.kernels)
        self.provider = f"openvino {', '.join(compiled.get_property('EXECUTION_DEVICES'))} {VERSION}"
        self.provider += f", {parts} streams" if parts > 1 else ""

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
        free = self._requests_for(shapes)
        requests = free.get()
        try:
            if len(requests) > 1:
                return self._run_parts(requests, arrays)
            (request,) = requests
            with errors("openvino cannot run the model"):
                for index, array in enumerate(arrays):
                    request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))
                request.infer()
            # One by one: the list of all takes 14 µs to make, a fiftieth of a small model's latency.
            return tuple(request.get_output_tensor(index).data.copy() for index in self._outputs)
        finally:
            free.put(requests)

    def _run_parts(self, requests: tuple[ov.InferRequest, ...], arrays: list[Array]) -> tuple[Array, ...]:
        """Run equal parts of a batch side by side, one by each request."""
        rows = len(arrays[0]) // len(requests)
        parts = [[array[part * rows : (part + 1) * rows] for array in arrays] for part in range(len(requests))]
        with errors("openvino cannot run the model"):
            for request, part in zip(requests, parts, strict=True):
                for index, array in enumerate(part):
                    request.set_input_tensor(index, ov.Tensor(array, shared_memory=True))
            try:
                for request in requests:
                    request.start_async()
            finally:  # those that run still read the arrays
                for request in requests:
                    request.wait()
        return tuple(
            np.concatenate([request.get_output_tensor(index).data for request in requests]) for index in self._outputs
        )

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
                parts = self._parts(shapes)
                self._others[shapes] = _requests(self._compile(shapes, parts), parts)
            self._others.move_to_end(shapes)
            return self._others[shapes]

    def _parts(self, shapes: Shapes) -> int:
        """Into how many parts a batch is divided."""
        return math.gcd(self._given.streams, *(shape[0] for shape in shapes)) if self.divisible else 1

    def _compile(self, shapes: Shapes, parts: int) -> ov.CompiledModel:
        if self._model is None:
            raise BackendError("this runner is closed", "load the model again")
        fixed = self._model.clone()  # shares the weights
        with errors(f"openvino cannot give the model inputs of shape {', '.join(map(str, shapes))}"):
            if parts > 1:
                shapes = tuple((shape[0] // parts, *shape[1:]) for shape in shapes)
            fixed.reshape({index: ov.PartialShape(list(shape)) for index, shape in enumerate(shapes)})
        return compile_model(fixed, self._target, self._given, streams=parts)


def _requests(compiled: ov.CompiledModel, parts: int) -> Requests:
    """As many inference requests as the compiled model runs best at a time, ``parts`` of them for each call."""
    requests: Requests = SimpleQueue()
    for _ in range(max(1, compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") // parts)):
        requests.put(tuple(compiled.create_infer_request() for _ in range(parts)))
    return requests


def batch_first(ports: list[ov.Output]) -> bool:
    """Whether the first dimension of every port is open."""
    shapes = [port.get_partial_shape() for port in ports]
    return all(shape.rank.is_static and len(shape) > 0 and shape[0].is_dynamic for shape in shapes)


def at_batch(shape: ov.PartialShape, batch: int) -> tuple[int, ...]:
    """A shape, its open dimensions at ``batch``."""
    return tuple(batch if size.is_dynamic else size.get_length() for size in shape)


def _shareable(array: Array) -> bool:
    return bool(array.flags.c_contiguous and array.flags.writeable)


def _dtype(port: ov.Output) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(port.get_element_type().to_dtype())
    return dtype


def _readable(shape: ov.PartialShape) -> str:
    return f"({', '.join('batch' if size.is_dynamic else str(size.get_length()) for size in shape)})"
