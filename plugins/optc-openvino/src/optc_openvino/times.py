"""How long each node of OpenVINO's execution graph takes: from its performance counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optc import KernelTime, Target, repeat_query
from optc_openvino.execution import kernels
from optc_openvino.graph import quantized_layers, whole
from optc_openvino.parts import compile_parts, run_side_by_side, set_parts
from optc_openvino.runtime import OpenVinoOptions, errors, ov


def kernel_times(
    model: ov.Model, target: Target, given: OpenVinoOptions, inputs: Sequence[NDArray[Any]]
) -> list[KernelTime]:
    """Run queries of ``inputs`` with OpenVINO's counters on: whole microseconds, the average over the queries.

    The parts of a divided batch run side by side, and the average is over them as well. What computes the pieces of one
    layer is one kernel here, as the layer's work cannot be told apart.

    Raises:
        BackendError: OpenVINO cannot compile or run the model.
    """
    shapes = tuple(array.shape for array in inputs)
    compiled, parts = compile_parts(model, shapes, target, given, {"PERF_COUNT": True})
    requests = tuple(compiled.create_infer_request() for _ in range(parts))
    arrays = [np.require(array, requirements=["C", "W"]) for array in inputs]
    set_parts(requests, arrays)
    repeat_query(lambda: run_side_by_side(requests))
    with errors("openvino cannot run the model"):
        counters = [counter for request in requests for counter in request.get_profiling_info()]
    known = {kernel.name: kernel for kernel in kernels(compiled)}
    layers = {weights: layer for layer, weights in quantized_layers(model).items()}
    found: dict[str, KernelTime] = {}
    for counter in counters:
        seconds = counter.real_time.total_seconds() / parts
        kernel = known.get(counter.node_name)
        # What took less than half a microsecond is said not to have been run.
        if kernel is None and (counter.status.name != "EXECUTED" or counter.node_type in ("Input", "Output", "Const")):
            continue
        originals = [each.partition("/")[0] for each in kernel.originals if each] if kernel else []
        name = counter.node_name
        if kernel is not None and kernel.is_layer:
            # Where OpenVINO moved a zero point or a scale, the layer is called by that and known by its weights only.
            name = whole(layers.get(kernel.weights, name))
            originals += [name.partition("/")[0]] if kernel.weights in layers else []
        kind, operator = kernel.kind if kernel else "", f"{counter.node_type} {counter.exec_type}"
        before = found.get(name, KernelTime(name, operator, 0.0, kind, ()))
        nodes = tuple(dict.fromkeys([*before.nodes, *originals]))
        found[name] = replace(before, seconds=before.seconds + seconds, nodes=nodes)
    return list(found.values())
