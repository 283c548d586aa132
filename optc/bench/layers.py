"""Where a query's time goes: each operator of a runtime beside what the machine could do at best (the roofline)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from optc.bench.peaks import Peaks
from optc.lowering.artifact import Artifact
from optc.lowering.eager_times import kernel_times
from optc.lowering.kernel_times import KernelTime
from optc.ops.costs import CostGraph, NodeCost, node_costs
from optc.plugins.registry import registry
from optc.program import Program
from optc.target import Target

OVERHEAD_SHARE = 0.25
"""Below this share of what its roof allows, an operator is said to be bound by neither compute nor memory."""


@dataclass(frozen=True)
class Layer:
    """An operator of a runtime with what it had to do and how long it took.

    Attributes:
        name, operator: as the runtime calls it and what it runs.
        nodes: the graph's nodes in it; empty for what the runtime added.
        module: path of the source module of the node with most operations; may be empty.
        kind: the type it computes in, ``"float32"``, ``"int8"``, …; may be empty.
        seconds: median time of a query.
        operations, bytes: what its nodes have to compute, and to read and write where nothing between them is stored.
        floor_seconds: the least time that takes here: at the peak for its type or the bandwidth for its size.
        bound: ``"compute"`` or ``"memory"``, whichever makes the floor; ``"overhead"`` where the time is far above it;
            empty where the graph does not say what it has to do.
    """

    name: str
    operator: str
    nodes: tuple[str, ...]
    module: str
    kind: str
    seconds: float
    operations: float
    bytes: int
    floor_seconds: float
    bound: str

    @property
    def share(self) -> float:
        """How much of what its roof allows it reaches, 0 to 1; more where a peak was measured too low."""
        return self.floor_seconds / self.seconds if self.seconds else 0.0

    @property
    def label(self) -> str:
        """Its module, or where it has none its node or what the runtime runs."""
        return self.module or (self.nodes[0] if self.nodes else self.operator)


@dataclass(frozen=True)
class LayerProfile:
    """All operators of a model in one runtime.

    Attributes:
        what: such as ``"onnxruntime"`` or ``"eager float32"``.
        layers: in the order they ran.
        operations, bytes: of the whole model, if it kept all it computes in the caches: weights, inputs and outputs.
        floor_seconds, bound: the least time for those, and which of the two makes it.
    """

    what: str
    layers: tuple[Layer, ...]
    operations: float
    bytes: int
    floor_seconds: float
    bound: str
    peaks: Peaks

    @property
    def seconds(self) -> float:
        """The sum over the operators; a query takes longer by what the runtime does between them."""
        return sum(layer.seconds for layer in self.layers)


def program_layers(program: Program, target: Target, peaks: Peaks) -> LayerProfile:
    """Profile a captured model as it is, in eager PyTorch on the CPU, on its example inputs."""
    query = [tensor[: target.batch].contiguous() for tensor in program.example_inputs]
    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)
    try:
        times = kernel_times(program.module, query)
    finally:
        torch.set_num_threads(before)
    return profiled("eager float32", times, node_costs(program, len(query[0])), {}, peaks)


def artifact_layers(artifact: Artifact, target: Target, peaks: Peaks) -> LayerProfile:
    """Profile an artifact in its runtime, on a query of noise.

    Raises:
        BackendError: the runtime has no profiler of its operators, or refuses the files.
    """
    manifest = artifact.manifest
    backend = registry().load("backend", manifest.backend)()
    query = artifact.example_query(target.batch)
    times = backend.profile(artifact.folder, manifest.load, target, query)
    costs = [NodeCost(**entry) for entry in manifest.report.get("costs", ())]
    if target.batch != manifest.target.get("batch", 1):
        costs = [_scaled(cost, target.batch / manifest.target.get("batch", 1)) for cost in costs]
    origins = manifest.report.get("lowering", {}).get("origins", {})
    return profiled(manifest.backend, times, costs, origins, peaks)


def profiled(
    what: str, times: Sequence[KernelTime], costs: Sequence[NodeCost], origins: Mapping[str, str], peaks: Peaks
) -> LayerProfile:
    """Put times beside costs.

    Args:
        origins: by the runtime's name of a node, the graph's; empty where they are the same.
    """
    graph = CostGraph(costs)
    weights = sum(cost.constant_bytes for cost in costs)
    layers = tuple(_layer(time, graph, origins, weights, peaks) for time in times)
    kinds = {node: layer.kind for layer in layers for node in layer.nodes if layer.kind}
    usual = next(iter(Counter(kinds.values()).most_common(1)), ("float32", 0))[0]
    computing = sum(cost.operations / peaks.compute(kinds.get(cost.node, usual)) for cost in costs)
    operations, constants, moved = graph.traffic(graph)
    moving = (constants + moved) / peaks.memory(constants + moved)
    bound = "compute" if computing >= moving else "memory"
    return LayerProfile(what, layers, operations, constants + moved, max(computing, moving), bound, peaks)


def _layer(time: KernelTime, graph: CostGraph, origins: Mapping[str, str], weights: int, peaks: Peaks) -> Layer:
    nodes = tuple(dict.fromkeys(origins.get(node, "") if origins else node for node in time.nodes))
    found = [graph[node] for node in nodes if node in graph]
    layer = Layer(time.name, time.operator, tuple(c.node for c in found), "", time.kind, time.seconds, 0.0, 0, 0.0, "")
    if not found:
        return layer
    operations, constants, moved = graph.traffic(layer.nodes)
    computing = operations / peaks.compute(time.kind)
    # Between two queries all weights pass through the caches; a layer's values were written just before.
    moving = (constants / peaks.memory(weights) if constants else 0.0) + moved / peaks.memory(moved)
    floor = max(computing, moving)
    bound = "compute" if computing >= moving else "memory"
    return replace(
        layer,
        module=max(found, key=lambda cost: cost.operations).module,
        operations=operations,
        bytes=constants + moved,
        floor_seconds=floor,
        bound=bound if floor >= OVERHEAD_SHARE * time.seconds else "overhead",
    )


def _scaled(cost: NodeCost, factor: float) -> NodeCost:
    return replace(
        cost,
        operations=cost.operations * factor,
        reads={source: round(size * factor) for source, size in cost.reads.items()},
        writes=round(cost.writes * factor),
    )
