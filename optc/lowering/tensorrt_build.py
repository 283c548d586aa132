"""From a Program on the GPU to a serialized TensorRT engine: Torch-TensorRT's dry run, its report, and the build."""

from __future__ import annotations

import contextlib
import io
import operator
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from optc.errors import BackendError, first_line
from optc.program import Program
from optc.target import Target

MAX_BATCH = 128
"""Largest batch an engine takes, if the target's is not larger. It is tuned for the target's batch."""
SETTINGS: Mapping[str, Any] = {
    "disable_tf32": True,  # float32 in the graph is float32 in the engine
    "truncate_double": False,  # nor is float64 silently float32
    "min_block_size": 1,
    "workspace_size": 0,  # TensorRT's default: as much as the GPU has
    "immutable_weights": True,
    "attn_bias_is_causal": False,  # Torch-TensorRT otherwise takes every attention bias for a causal mask
}
"""Settings of both the dry run and the build."""
_ACCELERATED = "_run_on_acc"


def export(program: Program, target: Target) -> ExportedProgram:
    """The program as an ExportedProgram whose batch, where dynamic, has the bounds of the engine.

    Raises:
        BackendError: torch.export refuses it.
    """
    batch = Dim("batch", min=1, max=largest_batch(target))
    shapes = tuple({0: batch} for _ in program.example_inputs) if program.dynamic_batch else None
    try:
        with torch.no_grad():
            return torch.export.export(program.module, program.example_inputs, dynamic_shapes=shapes)
    except Exception as error:
        raise BackendError(f"the optimized graph cannot be exported: {first_line(error)}") from error


def largest_batch(target: Target) -> int:
    """The largest batch an engine for ``target`` takes where the model's batch is dynamic."""
    return max(MAX_BATCH, target.batch)


def dry_run(exported: ExportedProgram, program: Program, target: Target) -> tuple[list[dict[str, str]], int]:
    """What Torch-TensorRT would leave to PyTorch, and how many engines it would build; builds none.

    Args:
        program: what was exported; gives the inputs.

    Returns:
        ``{"layer", "reason"}`` for each operator outside an engine (one that was decomposed only once for each reason),
        and the number of engines.

    Raises:
        BackendError: Torch-TensorRT fails.
    """
    from torch_tensorrt import dynamo
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import DYNAMO_CONVERTERS

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its own report
            partitioned = dynamo.compile(
                exported, inputs=_inputs(program, target), dryrun=True, require_full_compilation=False, **SETTINGS
            )
    except Exception as error:
        raise BackendError(f"Torch-TensorRT cannot partition the model: {first_line(error)}") from error

    def reason(node: fx.Node) -> str:
        if node.target not in DYNAMO_CONVERTERS:
            return f"Torch-TensorRT has no converter for {node.target}"
        if node not in DYNAMO_CONVERTERS:
            return f"Torch-TensorRT's converter for {node.target} does not take these arguments"
        return "Torch-TensorRT could convert it, but its partitioner left it out"

    return partition_report(partitioned, reason)


def partition_report(partitioned: fx.GraphModule, reason: Callable[[fx.Node], str]) -> tuple[list[dict[str, str]], int]:
    """Read a partitioned module: one submodule per engine, others for PyTorch.

    Args:
        reason: why an operator is not in an engine.
    """
    engines = 0
    outside: list[fx.Node] = list(partitioned.graph.nodes)
    for name, child in partitioned.named_children():
        if name.startswith(_ACCELERATED):
            engines += 1
        elif isinstance(child, fx.GraphModule):
            outside.extend(child.graph.nodes)
    found = {
        (_origin(node), reason(node)): None
        for node in outside
        if node.op == "call_function" and node.target is not operator.getitem
    }
    return [{"layer": layer, "reason": why} for layer, why in found], engines


def refuse_partition(rows: Iterable[Mapping[str, str]], engines: int) -> BackendError:
    """The error for a model that would be ``engines`` engines with PyTorch between them, with every reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["reason"], []).append(row["layer"])
    reasons = "; ".join(
        f"{reason} ({', '.join(layers[:3])}{f' and {len(layers) - 3} more' if len(layers) > 3 else ''})"
        for reason, layers in found.items()
    )
    return BackendError(
        f"TensorRT takes this model in {engines} engines, not in one: {reasons or 'nothing of it can be converted'}",
        "a partitioned model cannot be saved without pickle: use another backend",
    )


def build_engine(exported: ExportedProgram, program: Program, target: Target, scratch: Path) -> bytes:
    """The whole program as one serialized engine.

    Raises:
        BackendError: TensorRT fails to build it.
    """
    from torch_tensorrt import dynamo

    try:
        engine: bytes = dynamo.convert_exported_program_to_serialized_trt_engine(
            exported,
            inputs=_inputs(program, target),
            require_full_compilation=True,
            timing_cache_path=str(scratch / "timing.cache"),  # not the one in /tmp, which anyone may have written
            **SETTINGS,
        )
    except Exception as error:
        raise BackendError(f"TensorRT cannot build the engine: {first_line(error)}", "run with -v for more") from error
    return engine


def _inputs(program: Program, target: Target) -> list[Any]:
    """Torch-TensorRT's description of each input: shapes, with the batch's bounds where it is dynamic, and type."""
    import torch_tensorrt

    found = []
    for example in program.example_inputs:
        shape = tuple(example.shape)
        if program.dynamic_batch:
            least, most, usual = ((batch, *shape[1:]) for batch in (1, largest_batch(target), target.batch))
            found.append(torch_tensorrt.Input(min_shape=least, opt_shape=usual, max_shape=most, dtype=example.dtype))
        else:
            found.append(torch_tensorrt.Input(shape=shape, dtype=example.dtype))
    return found


def _origin(node: fx.Node) -> str:
    """Name of the node of the captured graph that ``node`` was decomposed from; its own if that is not known."""
    name, sources = node.name, list(node.meta.get("from_node") or ())
    while sources:
        name, sources = sources[0].name, list(sources[0].from_node)
    return str(name)
