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
        nodes: the graph's nodes that it has a part in; empty for what the runtime added.
        module: path of the source module of the node with most operations; may be empty.
        kind: the type it computes in, ``"float32"``, ``"int8"``, …; may be empty.
        seconds: median time of a query.
        operations, bytes: what its nodes have to compute, and to read and write where nothing between them is stored;
            a node that several operators have a part in counts for the slowest of them only.
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
    query = program.example_inputs
    if program.dynamic_batch:
        query = tuple(tensor[: target.batch].contiguous() for tensor in query)
    before = torch.get_num_threads()
    torch.set_num_threads(target.threads)
    try:
        times = kernel_times(program.module, query)
    finally:
        torch.set_num_threads(before)
    return profiled("eager float32", times, node_costs(program, len(query[0])), {}, peaks)


def artifact_layers(artifact: Artifact, target: Target, peaks: Peaks) -> LayerProfile:
    """Profile an artifact in its runtime, on a query of noise: of the target's batch, unless it takes one number only.

    Raises:
        BackendError: the runtime has no profiler of its operators, or refuses the files.
    """
    manifest = artifact.manifest
    backend = registry().load("backend", manifest.backend)()
    query = artifact.example_query(target.batch)
    times = backend.profile(artifact.folder, manifest.load, artifact.target(target), query)
    costs = [NodeCost(**entry) for entry in manifest.report.get("costs", ())]
    factor = len(query[0]) / manifest.target.get("batch", 1)
    costs = [_scaled(cost, factor) for cost in costs]
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
    claims = [_known(time.nodes, origins, graph) for time in times]
    owner: dict[str, int] = {}
    for index in sorted(range(len(times)), key=lambda index: -times[index].seconds):
        for node in claims[index]:
            owner.setdefault(node, index)  # what several operators have a part in counts for the slowest
    layers = tuple(
        _layer(time, nodes, [node for node in nodes if owner[node] == index], graph, weights, peaks)
        for index, (time, nodes) in enumerate(zip(times, claims, strict=True))
    )
    kinds = {node: layers[index].kind for node, index in owner.items() if layers[index].kind}
    work = Counter[str]()
    for node, kind in kinds.items():
        work[kind] += round(graph[node].operations)
    usual = next(iter(work.most_common(1)), ("float32", 0))[0]
    computing = sum(cost.operations / peaks.compute(kinds.get(cost.node, usual)) for cost in costs)
    operations, constants, moved = graph.traffic(graph)
    moving = (constants + moved) / peaks.memory(constants + moved)
    bound = "compute" if computing >= moving else "memory"
    return LayerProfile(what, layers, operations, constants + moved, max(computing, moving), bound, peaks)


def _known(names: Sequence[str], origins: Mapping[str, str], graph: CostGraph) -> tuple[str, ...]:
    """The graph's nodes behind a runtime's names."""
    nodes = dict.fromkeys(origins.get(name, "") if origins else name for name in names)
    return tuple(node for node in nodes if node in graph)


def _layer(
    time: KernelTime, nodes: tuple[str, ...], owned: Sequence[str], graph: CostGraph, weights: int, peaks: Peaks
) -> Layer:
    """An operator beside what the nodes it owns have to do; nothing is known of one that only has a part in some."""
    largest = max(nodes, key=lambda node: graph[node].operations, default=None)
    module = graph[largest].module if largest is not None else ""
    layer = Layer(time.name, time.operator, nodes, module, time.kind, time.seconds, 0.0, 0, 0.0, "")
    if not owned:
        return layer
    operations, constants, moved = graph.traffic(owned)
    computing = operations / peaks.compute(time.kind)
    # Between two queries all weights pass through the caches; a layer's values were written just before.
    moving = (constants / peaks.memory(weights) if constants else 0.0) + moved / peaks.memory(moved)
    floor = max(computing, moving)
    bound = "compute" if computing >= moving else "memory"
    return replace(
        layer,
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
