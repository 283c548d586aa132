"""A loaded model, compiled for one batch size at a time: the target's at once, another when it is first asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from contextlib import closing
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optc import BackendError, Runner, Target
from optc_openvino.execution import kernels, precision
from optc_openvino.parts import (
    Requests,
    Shapes,
    at_batch,
    compile_parts,
    is_divisible,
    noise,
    run_side_by_side,
    set_parts,
)
from optc_openvino.runtime import VERSION, OpenVinoOptions, ov

Array = NDArray[Any]
Free = SimpleQueue[Requests]
"""A compilation's inference requests that no call uses, as many together as a call takes."""
OTHER_BATCHES = 2
"""How many compilations are kept beside that of the target's batch. Each holds the weights in its kernels' layout."""


LEAVE_OUT_STREAMS = "leave out -O openvino.streams"


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
        self.divisible = is_divisible(model)
        self._lock = threading.Lock()
        self._others: OrderedDict[Shapes, Free] = OrderedDict()
        self._outputs = range(len(model.outputs))
        self._types = tuple(dtype for _, _, dtype in self._inputs)
        self._shapes = tuple(at_batch(shape, target.batch) for _, shape, _ in self._inputs)
        compiled, parts = compile_parts(model, self._shapes, target, self._given)
        self._requests: Free | None = _requests(compiled, parts)
        self.concurrency = self._requests.qsize()
        self.kernels = kernels(compiled)
        self.precision = precision(self.kernels)
        self.provider = f"openvino {', '.join(compiled.get_property('EXECUTION_DEVICES'))} {VERSION}"
        # OpenVINO takes no more than the CPU has cores, of which two hardware threads may be one.
        threads = compiled.get_property("INFERENCE_NUM_THREADS")
        self.provider += f", {threads} of {target.threads} threads" if threads < target.threads else ""
        self.provider += f", {parts} streams" if parts > 1 else ""

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Run one query. The inputs are not copied; the outputs are the caller's to keep.

        Raises:
            BackendError: the runner is closed, or an input has another shape or type than the model takes.
        """
        shapes = tuple(array.shape for array in inputs)
        if shapes != self._shapes or tuple(array.dtype for array in inputs) != self._types:
            self._check(inputs)
        # These names keep the arrays alive until the requests have run.
        arrays = [array if _shareable(array) else np.array(array, order="C") for array in inputs]
        free = self._requests_for(shapes)
        requests = free.get()
        try:
            set_parts(requests, arrays)
            run_side_by_side(requests)
            return tuple(self._output(requests, index) for index in self._outputs)
        finally:
            free.put(requests)

    def _output(self, requests: Requests, index: int) -> Array:
        # One by one: the list of all outputs takes 14 µs to make, a fiftieth of a small model's latency.
        parts = [request.get_output_tensor(index).data for request in requests]
        return np.concatenate(parts) if len(parts) > 1 else parts[0].copy()

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

    def _requests_for(self, shapes: Shapes) -> Free:
        requests = self._requests
        if requests is None:
            raise BackendError("this runner is closed", "load the model again")
        if shapes == self._shapes:
            return requests
        with self._lock:
            if shapes not in self._others:
                while len(self._others) >= OTHER_BATCHES:
                    self._others.popitem(last=False)
                if self._model is None:
                    raise BackendError("this runner is closed", "load the model again")
                compiled, parts = compile_parts(self._model, shapes, self._target, self._given)
                self._others[shapes] = _requests(compiled, parts)
            self._others.move_to_end(shapes)
            return self._others[shapes]


def refuse_dependent_samples(model: ov.Model, target: Target, given: OpenVinoOptions) -> None:
    """Run a batch of noise, a sample for each stream, divided and as a whole.

    Raises:
        BackendError: the outputs are not the same.
    """
    query = [noise(at_batch(port.get_partial_shape(), given.streams), _dtype(port)) for port in model.inputs]
    found = []
    for streams in (1, given.streams):
        options = given.model_copy(update={"streams": streams, "cache": False})
        with closing(OpenVinoRunner(model, replace(target, batch=given.streams), options)) as runner:
            found.append(runner(*query))
    for name, reference, output in zip(model.outputs, *found, strict=True):
        if reference.shape != output.shape or not _alike(reference, output):
            raise BackendError(
                f"output '{name.get_any_name()}' of a sample depends on others of its batch, which cannot be divided",
                LEAVE_OUT_STREAMS,
            )


def _alike(reference: Array, output: Array) -> bool:
    """Whether two outputs differ by roundings at most: in a quantized model these leave 10 dB or more."""
    finite = np.isfinite(reference)
    expected, given = reference[finite].astype(np.float64), output[finite].astype(np.float64)
    return 10 * float(np.square(expected - given).sum()) <= float(np.square(expected).sum())


def _requests(compiled: ov.CompiledModel, parts: int) -> Free:
    """As many inference requests as the compiled model runs best at a time, ``parts`` of them for each call."""
    requests: Free = SimpleQueue()
    for _ in range(max(1, compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS") // parts)):
        requests.put(tuple(compiled.create_infer_request() for _ in range(parts)))
    return requests


def _shareable(array: Array) -> bool:
    return bool(array.flags.c_contiguous and array.flags.writeable)


def _dtype(port: ov.Output) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(port.get_element_type().to_dtype())
    return dtype


def _readable(shape: ov.PartialShape) -> str:
    return f"({', '.join('batch' if size.is_dynamic else str(size.get_length()) for size in shape)})"
