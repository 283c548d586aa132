"""How long each node of a program takes in the eager backend, for a pass that shares a model out."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from optc.lowering.backend import Array
from optc.lowering.eager import EagerRunner
from optc.lowering.kernel_times import repeat_query
from optc.program import Program
from optc.target import Target


def node_times(program: Program, device: str, threads: int, batch: int) -> dict[str, float]:
    """Median seconds of each node in the eager backend, zero for those it does away with.

    Layers are laid out as that backend does at load. The profiler gives each node's part; it takes time itself, so the
    parts are scaled to add up to what the whole takes without it.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: intra-op threads, which this process has again afterwards what it had.
        batch: images; where the batch is not dynamic the one captured.
    """
    before = torch.get_num_threads()
    copy = program.fork()
    for node in copy.graph.nodes:
        node.meta.pop("replaces", None)  # from here on it tells what packing replaced
    runner = EagerRunner(copy, Target(device=device, threads=threads, batch=batch))
    inputs = [_resized(tensor, batch) for tensor in program.example_inputs]
    try:
        times = runner.profile(inputs)
        taken: list[float] = []

        def call() -> None:
            start = time.perf_counter()
            runner(*inputs)
            taken.append(time.perf_counter() - start)

        calls = repeat_query(call)
    finally:
        runner.close()
        torch.set_num_threads(before)
    whole = statistics.median(taken[-(calls - 2) :])
    found = dict.fromkeys((node.name for node in program.graph.nodes), 0.0)
    for each in times:
        for name in each.nodes:
            if name in found:
                found[name] += each.seconds / len(each.nodes)
    scale = whole / sum(found.values()) if any(found.values()) else 1.0
    return {name: seconds * scale for name, seconds in found.items()}


def _resized(tensor: torch.Tensor, batch: int) -> Array:
    repeats = -(-batch // len(tensor))
    array: Array = np.concatenate([tensor.detach().cpu().numpy()] * repeats)[:batch]
    return array
