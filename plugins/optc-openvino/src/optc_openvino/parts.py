"""A batch in equal parts that run side by side, each by a request of its own with its share of the threads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from optc import Target
from optc_openvino.runtime import OpenVinoOptions, compile_model, errors, ov

Shapes = tuple[tuple[int, ...], ...]
Requests = tuple[ov.InferRequest, ...]


def is_divisible(model: ov.Model) -> bool:
    """Whether the first dimension of every input and output is open, so that it takes a batch of any size."""
    shapes = [port.get_partial_shape() for port in (*model.inputs, *model.outputs)]
    return all(shape.rank.is_static and len(shape) > 0 and shape[0].is_dynamic for shape in shapes)


def at_batch(shape: ov.PartialShape, batch: int) -> tuple[int, ...]:
    """A shape, its open dimensions at ``batch``."""
    return tuple(batch if size.is_dynamic else size.get_length() for size in shape)


def compile_parts(
    model: ov.Model,
    shapes: Shapes,
    target: Target,
    given: OpenVinoOptions,
    further: Mapping[str, Any] | None = None,
) -> tuple[ov.CompiledModel, int]:
    """Compile a model, which is left as it is, for equal parts of inputs of these shapes.

    Args:
        given: the backend's options; the largest number of parts that divides both ``streams`` and the batch is taken.
        further: OpenVINO's own options.

    Returns:
        What is compiled, and how many parts there are.

    Raises:
        BackendError: the model does not take the shapes, or OpenVINO has no way to run it.
    """
    parts = math.gcd(given.streams, *(shape[0] for shape in shapes)) if is_divisible(model) else 1
    fixed = model.clone()  # shares the weights
    with errors(f"openvino cannot give the model inputs of shape {', '.join(map(str, shapes))}"):
        if parts > 1:
            shapes = tuple((shape[0] // parts, *shape[1:]) for shape in shapes)
        fixed.reshape({index: ov.PartialShape(list(shape)) for index, shape in enumerate(shapes)})
    return compile_model(fixed, target, given, further, streams=parts), parts


def noise(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """Seeded noise, none of it negative: zeros and ones if these are indices."""
    return np.abs(np.random.default_rng(0).standard_normal(shape)).astype(dtype)


def compile_and_fill(
    model: ov.Model, target: Target, given: OpenVinoOptions, further: Mapping[str, Any] | None = None
) -> tuple[ov.CompiledModel, Requests]:
    """Compile for the target's batch, to be measured: requests that have noise to run on, and nothing kept on disk.

    Raises:
        BackendError: OpenVINO has no way to run the model.
    """
    shapes = tuple(at_batch(port.get_partial_shape(), target.batch) for port in model.inputs)
    options = given.model_copy(update={"cache": False})  # what is tried is not worth a place on disk
    compiled, parts = compile_parts(model, shapes, target, options, further)
    requests = tuple(compiled.create_infer_request() for _ in range(parts))
    for request in requests:
        for tensor in request.input_tensors:
            tensor.data[:] = noise(tensor.data.shape, tensor.data.dtype)
    return compiled, requests


def set_parts(requests: Requests, arrays: Sequence[NDArray[Any]]) -> None:
    """Give each request its part of a query's arrays.

    They are contiguous, are not copied and have to live until the requests have run: a tensor that shares an array's
    memory does not keep it alive.

    Raises:
        BackendError: OpenVINO does not take them.
    """
    with errors("openvino cannot run the model"):
        for part, request in enumerate(requests):
            for index, array in enumerate(arrays):
                rows = len(array) // len(requests) if len(requests) > 1 else None
                own = array[part * rows : (part + 1) * rows] if rows else array
                request.set_input_tensor(index, ov.Tensor(own, shared_memory=True))


def run_side_by_side(requests: Requests) -> None:
    """Run all requests, and wait for them whatever happens: those that run still read their inputs.

    Raises:
        BackendError: OpenVINO cannot run the model.
    """
    with errors("openvino cannot run the model"):
        if len(requests) == 1:
            requests[0].infer()  # sooner than to start and to wait
            return
        with ExitStack() as running:
            for request in requests:
                request.start_async()
                running.callback(request.wait)
