"""How long each node of a graph takes in eager PyTorch: from PyTorch's profiler."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._autograd import DeviceType
from torch._ops import OpOverload
from torch.autograd import profiler

from optc.lowering.kernel_times import KernelTime, medians, repeat_query

_PREFIX = "optc node "
_BY_TYPE = ("float32", "float16", "bfloat16", "float64")


def kernel_times(module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[KernelTime]:
    """Run the graph on ``inputs`` under PyTorch's profiler, each operator in a range of its name.

    The time of a range is the CPU's, dispatch included; on a GPU that of its kernels. The names are the graph's own;
    a node that stands for another after packing (``meta["replaces"]``) has that one's.
    """
    interpreter = _Marked(module)
    on_gpu = inputs[0].is_cuda
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # else the recorder writes to the terminal when it starts and stops
    device = "cuda" if on_gpu else None
    with torch.inference_mode(), profiler.profile(use_kineto=True, use_device=device, acc_events=True) as recorded:
        calls = repeat_query(lambda: interpreter.run(*inputs))
    # On a GPU each range is there once more, as what its kernels took.
    events = [event for event in recorded.function_events or () if event.device_type == DeviceType.CPU]
    ranges = sorted(
        (event for event in events if event.name.startswith(_PREFIX)),
        key=lambda event: event.time_range.start,
    )
    times = medians(
        (
            (event.name.removeprefix(_PREFIX), (event.device_time if on_gpu else event.cpu_time) / 1e6)
            for event in ranges
        ),
        calls,
    )
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return [
        KernelTime(node.name, _operator(node), times[node.name], _kind(node), (node.meta.get("replaces", node.name),))
        for node in nodes
        if node.name in times
    ]


class _Marked(fx.Interpreter):
    """Runs a graph with each call in a range of the profiler, values freed when they are no longer read."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        with profiler.record_function(f"{_PREFIX}{n.name}"):
            return super().run_node(n)


def _operator(node: fx.Node) -> str:
    return str(node.target) if isinstance(node.target, OpOverload) else getattr(node.target, "__name__", "")


def _kind(node: fx.Node) -> str:
    value = node.meta.get("val")
    name = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
    return name if name in _BY_TYPE else ""
