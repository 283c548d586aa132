"""How long each node of a program takes in the eager backend, for a pass that shares a model out."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from optc.lowering.agreement import as_array
from optc.lowering.backend import Array
from optc.lowering.eager import EagerRunner
from optc.lowering.graph_file import read_graph, write_graph
from optc.lowering.kernel_times import WARM_UP, KernelTime, repeat_query
from optc.program import Program
from optc.target import Target

OPENINGS = 3
"""How a model happens to lie in memory changes its speed by some percent for as long as it is open."""
_SECONDS = 10.0
"""After so long a model is not opened again."""


def node_times(program: Program, device: str, threads: int, batch: int) -> dict[str, float]:
    """Seconds of each node in the eager backend, zero for those it does away with; the same for nodes that do the same.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: intra-op threads; this process has as many as before afterwards.
        batch: images; where the batch is not dynamic the one captured.
    """
    return _evened(program, each_node_time(program, device, threads, batch))


def each_node_time(program: Program, device: str, threads: int, batch: int) -> dict[str, float]:
    """Median seconds of each node as it was measured; arguments as for :func:`node_times`.

    Layers are laid out as that backend does at load. The profiler gives each node's part; it takes time itself, so the
    parts are scaled to add up to what the whole takes without it: the median of three openings, or of fewer where a
    model takes seconds.
    """
    before, start = torch.get_num_threads(), time.perf_counter()
    inputs = [_resized(tensor, batch) for tensor in program.example_inputs]
    parts: list[KernelTime] = []
    wholes: list[float] = []
    try:
        for opening in range(OPENINGS):
            runner = _opened(program, Target(device=device, threads=threads, batch=batch))
            wholes.append(_median_seconds(runner, inputs))
            if not opening:
                parts = runner.profile(inputs)
            runner.close()
            gc.collect()  # so that its weights are gone before there are others
            if time.perf_counter() - start > _SECONDS:
                break
    finally:
        torch.set_num_threads(before)
    found = dict.fromkeys((node.name for node in program.graph.nodes), 0.0)
    for part in parts:
        for name in part.nodes:
            if name in found:
                found[name] += part.seconds / len(part.nodes)
    total = sum(found.values())
    scale = statistics.median(wholes) / total if total else 1.0
    return {name: seconds * scale for name, seconds in found.items()}


def _evened(program: Program, found: dict[str, float]) -> dict[str, float]:
    """Nodes that do the same (operator, shapes, options) take the same time: the mean over all of them."""
    alike: dict[str, list[str]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "call_function":
            alike[f"{node.target} {fx.map_arg((node.args, node.kwargs), _described)}"].append(node.name)
    means = {name: sum(found[each] for each in names) / len(names) for names in alike.values() for name in names}
    return {name: means.get(name, seconds) for name, seconds in found.items()}


def _described(node: fx.Node) -> Any:
    """What of an operand decides how long an operator takes."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return type(value).__name__
    return node.op == "get_attr", str(value.dtype), tuple(value.shape), value.stride()


def _opened(program: Program, target: Target) -> EagerRunner:
    if target.device != "cpu":  # moving a module there takes the parameters along that it shares with the caller's
        with tempfile.TemporaryDirectory(prefix="optc-nodes-") as folder:
            write_graph(program, Path(folder))
            return EagerRunner(read_graph(Path(folder), max(1, target.batch), target.device), target)
    copy = program.fork()
    for node in copy.graph.nodes:
        node.meta.pop("replaces", None)  # from here on it tells what packing replaced
    return EagerRunner(copy, target)


def _median_seconds(runner: EagerRunner, inputs: Sequence[Array]) -> float:
    taken: list[float] = []

    def call() -> None:
        start = time.perf_counter()
        runner(*inputs)
        taken.append(time.perf_counter() - start)

    repeat_query(call)
    return statistics.median(taken[WARM_UP:])


def _resized(tensor: Tensor, batch: int) -> Array:
    """So many images, those of the tensor over and over."""
    repeats = -(-batch // len(tensor))
    array: Array = np.concatenate([as_array(tensor)] * repeats)[:batch]
    return array
