"""``partition``: cuts a graph into stages for pipeline parallelism; the slowest one is as fast as it can be."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import Field
from torch import fx

from optc import Change, OptcError, Pass, PassContext, PassOptions, PassResult, Program
from optc.rewrite import loosen_layout
from optc_passes.partition_costs import local_devices, node_seconds, unit_seconds
from optc_passes.partition_cut import Chain, Cut, Integers, cut
from optc_passes.partition_devices import GB, MOST, Device, parse
from optc_passes.partition_graph import Row, Work, few_alive, row

_FIT_STEPS = 40


class Partition(Pass):
    """Gives every node its stage in ``meta["stage"]``; the graph stays whole, and computes what it did.

    Two topological orders are considered, the graph's own and one that keeps few bytes alive; over each the cut is
    exact (:mod:`optc_passes.partition_cut`), and the better of both is taken.
    """

    name = "partition"
    summary = "Cut the graph into pipeline stages so that the slowest one is as fast as it can be."

    class Options(PassOptions):
        stages: int | None = Field(None, ge=1, le=MOST, description="number of stages; none: one for each device, or 2")
        devices: str = Field(
            "", description="4xh100, 1xh100,2xa100, 2xcpu:1 or a TOML file, one device a stage; empty: the target's own"
        )
        microbatches: int = Field(1, ge=1, description="parts that a batch goes through the stages in")
        batch: int | None = Field(
            None, ge=1, description="images in a batch; none: the target's, or one in each microbatch"
        )
        simulate: bool = Field(False, description="measure nothing here: times are the devices' rooflines")

    options: Options

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find the stages and write them into the graph.

        Raises:
            OptcError: an option does not fit the model or the devices; a stage cannot fit into its device's memory.
        """
        devices = self._devices(context)
        microbatch = self._microbatch(program, context.target.batch)
        work = Work(program, microbatch)
        if len(devices) > len(work.units):
            raise OptcError(f"{len(devices)} stages for {len(work.units)} operators", "ask for fewer stages")
        simulate = self.options.simulate
        found = {device: node_seconds(program, device, microbatch, context, simulate) for device in set(devices)}
        times = {device: seconds for device, (seconds, _) in found.items()}
        context.progress("looking for the best cut")
        rows = [row(work, work.units)]
        other = few_alive(work)
        if other != work.units:
            rows.append(row(work, other))
        plans = [plan for each in rows if (plan := _plan(each, devices, times))]
        if not plans:
            raise _too_large(rows[0], devices, times)
        best = min(plans, key=lambda plan: plan.found.slowest)
        before = program.fingerprint()
        _write(program, best)
        account = tuple(
            {**entry, "timing": found[device][1], "microbatches": self.options.microbatches, "microbatch": microbatch}
            for entry, device in zip(_account(best, times), devices, strict=True)
        )
        modified = program.fingerprint() != before
        applied = tuple(
            Change("stage", best.row.units[begin].nodes[0].name, f"stage {stage} begins, on {devices[stage].name}")
            for stage, begin in enumerate((0, *best.found.cuts))
        )
        return PassResult(program, modified, applied if modified else (), account=account)

    def _devices(self, context: PassContext) -> tuple[Device, ...]:
        stages = self.options.stages
        if not self.options.devices:
            return self._on_this_machine(local_devices(context, stages or 2), context)
        devices = parse(self.options.devices)
        if stages is not None and stages != len(devices):
            raise OptcError(
                f"{len(devices)} devices ('{self.options.devices}') for {stages} stages",
                "give one device for each stage",
            )
        return self._on_this_machine(devices, context)

    def _on_this_machine(self, devices: tuple[Device, ...], context: PassContext) -> tuple[Device, ...]:
        """Stages on this machine's CPU share its memory, and are told of if they must share threads."""
        if self.options.simulate:
            return devices
        threads = sum(device.threads for device in devices)
        if context.target.device == "cpu" and threads > context.target.threads:
            context.note(
                f"the stages have {threads} threads, and {context.target.threads} are at hand: they will take turns,"
                " and the pipeline is slower than predicted"
            )
        sharing = sum(device.threads > 0 and device.memory is None for device in devices)
        if not sharing or context.memory is None:
            return devices
        share = context.memory // sharing
        return tuple(
            replace(device, memory=share, sharing=sharing) if device.threads and device.memory is None else device
            for device in devices
        )

    def _microbatch(self, program: Program, query: int) -> int:
        """Images in a microbatch; ``query``: as many as the target has in a batch."""
        count = self.options.microbatches
        fixed = None if program.dynamic_batch else len(program.example_inputs[0])
        batch = self.options.batch or (count * fixed if fixed else max(count, query))
        if batch % count:
            raise OptcError(
                f"{count} microbatches do not divide a batch of {batch}", "choose a number of microbatches that does"
            )
        if fixed and batch // count != fixed:
            raise OptcError(
                f"the model was captured for batch size {fixed} only, a microbatch has {batch // count}",
                f"give a batch of {count * fixed}",
            )
        return batch // count


@dataclass(frozen=True)
class _Plan:
    """An order with its best cut."""

    row: Row
    devices: tuple[Device, ...]
    chain: Chain
    found: Cut


Times = Mapping[Device, Mapping[str, float]]


def _plan(each: Row, devices: tuple[Device, ...], times: Times, memory_scale: float | None = 1.0) -> _Plan | None:
    """The best cut of one order, ``None`` if there is none within the devices' memory."""
    seconds = {device: unit_seconds(each.work, each.units, times[device]) for device in times}
    limits = {
        device: None if device.memory is None or memory_scale is None else int(device.memory * memory_scale)
        for device in times
    }
    earliest: dict[int | None, Integers] = {limit: each.earliest(limit) for limit in set(limits.values())}
    transfer = np.full((len(devices) - 1, len(each.units) + 1), np.inf)
    for stage, (one, two) in enumerate(itertools.pairwise(devices)):
        latency = max(one.link_latency, two.link_latency)
        bandwidth = min(one.link_bandwidth, two.link_bandwidth)
        transfer[stage, each.possible] = latency + each.carried[each.possible] / bandwidth
    chain = Chain(
        np.array([seconds[device] for device in devices]),
        transfer,
        np.array([earliest[limits[device]] for device in devices]),
    )
    found = cut(chain)
    return _Plan(each, devices, chain, found) if found else None


def _too_large(each: Row, devices: tuple[Device, ...], times: Times) -> OptcError:
    """Why there is no cut: with the numbers of the cut that needs the smallest share of the devices' memory."""
    if _plan(each, devices, times, None) is None:
        places = int(each.possible[1:-1].sum())
        return OptcError(
            f"the model cannot be cut into {len(devices)} stages: between its operators are {places} places where"
            " everything alive can be handed on",
            "ask for fewer stages",
        )
    low, high = 1.0, 2.0
    while (plan := _plan(each, devices, times, high)) is None:
        low, high = high, 2 * high
    for _ in range(_FIT_STEPS):
        middle = (low + high) / 2
        found = _plan(each, devices, times, middle)
        low, high, plan = (low, middle, found) if found else (middle, high, plan)
    rows = [entry for entry in _account(plan, times) if entry["memory_bytes"] is not None]
    worst = max(rows, key=lambda entry: (entry["weight_bytes"] + entry["activation_bytes"]) / entry["memory_bytes"])
    needed = worst["weight_bytes"] + worst["activation_bytes"]
    return OptcError(
        f"the model does not fit: however it is cut into {len(devices)} stages, one is too large for its device."
        f" At best stage {worst['stage']} needs {needed / GB:.3g} GB (weights {worst['weight_bytes'] / GB:.3g},"
        f" activations {worst['activation_bytes'] / GB:.3g}) and {worst['device']} has"
        f" {worst['memory_bytes'] / GB:.3g} GB",
        "use more stages, larger devices or smaller microbatches",
    )


def _account(plan: _Plan, times: Times) -> list[dict[str, Any]]:
    """One row for each stage; times and sizes are those of one microbatch."""
    each, chain = plan.row, plan.chain
    ends = (0, *plan.found.cuts, len(each.units))
    rows = []
    for stage, (begin, end) in enumerate(itertools.pairwise(ends)):
        device = plan.devices[stage]
        first, last = stage == 0, stage == len(plan.devices) - 1
        rows.append(
            {
                "stage": stage,
                "device": device.name,
                "nodes": sum(len(unit.nodes) for unit in each.units[begin:end]),
                "compute_seconds": float(chain.seconds[stage, begin:end].sum()),
                "receive_seconds": 0.0 if first else float(chain.transfer[stage - 1, begin]),
                "send_seconds": 0.0 if last else float(chain.transfer[stage, end]),
                "weight_bytes": each.weights(begin, end),
                "activation_bytes": int(each.live[begin:end].max()),
                "memory_bytes": device.memory,
                "send_bytes": 0 if last else int(each.carried[end]),
                "cut": [] if last else [_tensor(each.work, node) for node in each.crossing(end)],
                "whole_seconds": float(chain.seconds[stage].sum()),
                "whole_memory_bytes": None if device.memory is None else device.memory * device.sharing,
                "whole_bytes": each.weights(0, len(each.units)) + int(each.live.max()),
            }
        )
    return rows


def _tensor(work: Work, node: fx.Node) -> dict[str, Any]:
    kind = str(node.meta["val"].dtype).removeprefix("torch.")
    return {"name": node.name, "shape": list(work.shape(node)), "dtype": kind, "bytes": work.bytes(node)}


def _write(program: Program, plan: _Plan) -> None:
    """Give every call its stage; where the plan's order is another than the graph's, move the calls into it."""
    ends = (0, *plan.found.cuts, len(plan.row.units))
    planned = {
        node: stage
        for stage, (begin, end) in enumerate(itertools.pairwise(ends))
        for unit in plan.row.units[begin:end]
        for node in unit.nodes
    }
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    stages: dict[fx.Node, int] = {}
    for node in calls:
        stages[node] = planned.get(node, next(reversed(stages.values()), 0))
    same_order = [node for node in calls if node in planned] == list(planned)
    if not same_order:
        stages = _in_order(planned, calls, plan.row.work.free)
        for node in stages:
            program.graph.output_node().prepend(node)
    for node, stage in stages.items():
        node.meta["stage"] = stage
    sent = {node for at in plan.found.cuts for node in plan.row.crossing(at)}
    loosen_layout(node for node in sent if not node.meta["val"].is_contiguous())  # they arrive contiguous


def _in_order(planned: Mapping[fx.Node, int], calls: Sequence[fx.Node], free: set[fx.Node]) -> dict[fx.Node, int]:
    """All calls with their stages in the planned order; what is free comes just before it is first read."""
    stages: dict[fx.Node, int] = {}
    for node in (*planned, *calls):  # in the end what only an output reads
        pending = [node]
        while pending:
            each = pending[-1]
            needed = (one for one in each.all_input_nodes if one in free and one.op != "get_attr")
            missing = [one for one in needed if one not in stages]
            pending += missing
            if not missing:
                last = next(reversed(stages.values()), 0)
                stages.setdefault(pending.pop(), planned.get(node, last))
    return stages
