"""Time of every exact pass over graphs of 1,000, 10,000 and 50,000 nodes: does it grow linearly?"""

from __future__ import annotations

import gc
import operator
import time
from itertools import count

import numpy as np
import torch
from common import Result, publish, say
from torch import fx, nn

from optc import Pass, PassContext, Program
from optc.plugins.registry import registry
from optc.program import complete_meta

SIZES = (1_000, 10_000, 50_000)
LIMIT_EXPONENT = 1.1
REPEATS = 3
CHANNELS, SIDE = 4, 2
aten = torch.ops.aten


def chain(nodes: int) -> Program:
    """A chain of about ``nodes`` nodes with work for every pass: conv + batch norm + relu + residual add, a copy, layer
    norm + two linear layers over one input, added, relu. Weights are tiny and no two are shared.
    """
    root, graph, number = nn.Module(), fx.Graph(), count()
    generator = torch.Generator().manual_seed(0)

    def constant(*shape: int) -> fx.Node:
        name = f"constant_{next(number)}"
        root.register_buffer(name, torch.rand(*shape, generator=generator) + 0.5)
        return graph.get_attr(name)

    def call(target: torch._ops.OpOverload, *arguments: object) -> fx.Node:
        return graph.call_function(target, arguments)

    x = graph.placeholder("x")
    while len(graph.nodes) < nodes:
        block = x
        x = call(aten.conv2d.default, x, constant(CHANNELS, CHANNELS, 1, 1), constant(CHANNELS))
        x = call(
            aten._native_batch_norm_legit_no_training.default, x, *[constant(CHANNELS) for _ in range(4)], 0.1, 1e-5
        )
        x = graph.call_function(operator.getitem, (x, 0))
        x = call(aten.relu.default, call(aten.add.Tensor, x, block))
        x = call(aten.clone.default, x)
        x = call(aten.layer_norm.default, x, [SIDE], constant(SIDE), constant(SIDE))
        branches = [call(aten.linear.default, x, constant(SIDE, SIDE), constant(SIDE)) for _ in range(2)]
        x = call(aten.relu.default, call(aten.add.Tensor, *branches))
    graph.output((x,))
    program = Program(fx.GraphModule(root, graph), (torch.rand(2, CHANNELS, SIDE, SIDE),), dynamic_batch=False)
    complete_meta(program)
    return program


def exact_passes() -> list[Pass]:
    """Every registered pass that promises the same outputs, groups such as ``fuse`` too."""
    passes: list[Pass] = [registry().load("pass", name)() for name in registry().all("pass")]
    return [pass_ for pass_ in passes if all(leaf.numerics.exact for leaf in pass_.leaves())]


def benchmark() -> Result:
    """Each pass under its contract, as a user runs it, on a fresh graph of each size."""
    passes = exact_passes()
    seconds: dict[str, list[list[float]]] = {pass_.name: [] for pass_ in passes}
    real_sizes = []
    for size in SIZES:
        program = chain(size)
        real_sizes.append(len(program.graph.nodes))
        say(f"{real_sizes[-1]} nodes")
        for pass_ in passes:
            seconds[pass_.name].append([_time(pass_, program) for _ in range(REPEATS)])
            say(f"{pass_.name}: {min(seconds[pass_.name][-1]):.2f} s")
    best = {name: [min(repeats) for repeats in times] for name, times in seconds.items()}
    exponents = {name: _exponent(real_sizes[-2:], times[-2:]) for name, times in best.items()}
    worst = max(exponents, key=lambda name: exponents[name])
    table = [
        {
            "pass": name,
            **{f"µs per node at {n:,}": duration / n * 1e6 for n, duration in zip(real_sizes, times, strict=True)},
            "seconds at the largest": times[-1],
            "exponent, two largest": f"{exponents[name]:.2f}",
            "exponent, all sizes": f"{_exponent(real_sizes, times):.2f}",
        }
        for name, times in best.items()
    ]
    return Result(
        claim=f"Pass time grows linearly: time ∝ nodes^e with e at most {LIMIT_EXPONENT} from 10,000 to 50,000 nodes.",
        held=exponents[worst] <= LIMIT_EXPONENT,
        finding=f"largest exponent {exponents[worst]:.2f} ({worst})",
        table=table,
        raw={"nodes": real_sizes, "cpu_seconds": seconds, "exponents": exponents},
        notes=[
            f"CPU time of one thread, the best of {REPEATS}, Python's garbage collector off.",
            "It includes the contract (fork, fingerprints, lint, shapes of new nodes), as in every run.",
        ],
    )


def _exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of log time over log nodes. The two largest sizes decide: a quadratic term shows most there."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


def _time(pass_: Pass, program: Program) -> float:
    """CPU seconds of one run, Python's garbage collector off.

    The collector walks the whole heap ever again as it grows: with it on the exponent is 1.17 where it is 1.01 without.
    """
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        pass_(program, PassContext())
        return time.process_time() - start
    finally:
        gc.enable()


if __name__ == "__main__":
    torch.set_num_threads(1)
    publish("pass_scaling", benchmark)
