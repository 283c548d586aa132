"""How long each node takes on a device: measured where the device is at hand, else the least a roofline allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from optc import OptcError, PassContext, Program
from optc.ops.costs import node_costs
from optc.rewrite import is_dequantize
from optc_passes.partition_devices import KNOWN, Device, cpu
from optc_passes.partition_graph import Unit, Work

MEASURED, ROOFLINE = "measured", "roofline"


def local_devices(context: PassContext, stages: int) -> tuple[Device, ...]:
    """The target's own devices for so many stages: the CPU's threads shared out, or GPUs like the one at hand.

    Raises:
        OptcError: nothing is known of the target's GPU.
    """
    if context.target.device == "cpu":
        return (cpu(max(1, context.target.threads // stages)),) * stages
    name = _gpu_at_hand(context) or context.target.device
    found = next((device for key, device in sorted(KNOWN.items(), reverse=True) if key in name.split()), None)
    if found is None:
        raise OptcError(f"nothing is known of the device '{name}'", "describe it in a TOML file: see docs/partition.md")
    if found.memory is not None and (here := _memory_at_hand(context)) is not None:
        found = replace(found, memory=min(found.memory, here))  # a model of it may have less than the data sheet's
    return (found,) * stages


def _gpu_at_hand(context: PassContext) -> str | None:
    """Name of the GPU in lower case, ``None`` if there is none or the target is another device."""
    import torch

    if context.target.device != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name().lower().replace("-", " ")


def _memory_at_hand(context: PassContext) -> int | None:
    """Bytes of the GPU at hand."""
    import torch

    return None if _gpu_at_hand(context) is None else torch.cuda.get_device_properties(0).total_memory


def node_seconds(
    program: Program, device: Device, batch: int, context: PassContext, simulate: bool
) -> tuple[Mapping[str, float], str]:
    """Seconds of every node for a microbatch, and :data:`MEASURED` or :data:`ROOFLINE`.

    Measured are CPUs, and the GPU at hand under its name; where the context cannot measure, or ``simulate`` says not
    to, each node takes what its operations take at the device's peak for its type, or its bytes at the bandwidth.
    """
    kind = "cpu" if device.threads else "cuda"
    here = device.threads > 0 or device.name in (_gpu_at_hand(context) or "").split()
    if context.node_times is not None and here and not simulate:
        context.progress(f"timing each node on {device.name}")
        return context.node_times(program, kind, device.threads or 1, batch), MEASURED
    kinds = {node.name: _kind(node) for node in program.graph.nodes}
    seconds = {}
    for cost in node_costs(program, batch):
        moved = sum(cost.reads.values()) + cost.writes + cost.constant_bytes
        seconds[cost.node] = max(cost.operations / device.peak(kinds[cost.node]), moved / device.bandwidth)
    return seconds, ROOFLINE


def _kind(node: fx.Node) -> str:
    """The type a node computes in: int8 where all it reads besides biases is dequantized, else its result's."""
    operands = [each for each in node.all_input_nodes if each.op == "call_function"]
    if len(operands) > 1 and all(map(is_dequantize, operands[:2])):
        return "int8"
    value = node.meta.get("val")
    return str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""


def unit_seconds(work: Work, units: Sequence[Unit], seconds: Mapping[str, float]) -> NDArray[np.float64]:
    """Seconds of each unit, in order: its nodes', and those of what is free where it is the first to read that."""
    seen: set[fx.Node] = set()

    def free(node: fx.Node) -> float:
        total = 0.0
        for each in node.all_input_nodes:
            if each in work.free and each not in seen:
                seen.add(each)
                total += seconds.get(each.name, 0.0) + free(each)
        return total

    return np.array([sum(seconds.get(node.name, 0.0) + free(node) for node in unit.nodes) for unit in units])
