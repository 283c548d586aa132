"""Capture: an ``nn.Module`` becomes a Program through ``torch.export``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram

from optc.errors import CaptureError
from optc.program import ModelInfo, Program, complete_meta, graph_module


def capture(
    model: torch.nn.Module,
    example_inputs: Sequence[Tensor],
    dynamic_batch: bool = True,
    info: ModelInfo | None = None,
) -> Program:
    """Capture a model as a flat functional ATen graph.

    Args:
        model: put into eval mode for the capture; its parameters are shared with the program, not copied.
        example_inputs: one tensor per positional argument, batch first.
        dynamic_batch: let dimension 0 of every input vary.
        info: where the model came from, kept with the program.

    Raises:
        CaptureError: torch.export cannot capture the model; carries its reason and the line of the model's code.
    """
    model.eval()
    inputs = tuple(torch.cat([t, t]) if dynamic_batch and t.shape[0] == 1 else t for t in example_inputs)
    shapes = tuple({0: Dim.DYNAMIC} if dynamic_batch else None for _ in inputs)
    try:
        with torch.no_grad():
            exported = torch.export.export(model, inputs, dynamic_shapes=shapes)
    except Exception as error:
        raise CaptureError(f"cannot capture {type(model).__name__}: {error}") from error
    return program_from_exported(exported, inputs, dynamic_batch, info or ModelInfo(name=type(model).__name__))


def program_from_exported(
    exported: ExportedProgram, inputs: tuple[Tensor, ...], dynamic_batch: bool, info: ModelInfo
) -> Program:
    """A Program from an ExportedProgram: functionalised, flat inputs and outputs, static example shapes in meta."""
    exported = exported.run_decompositions({})
    unlifted = exported.module(check_guards=False)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(unlifted.graph, values)
    outputs = [values[n] if isinstance(n, fx.Node) else n for n in torch.utils._pytree.tree_leaves(unlifted.graph.output_node().args[0])]
    graph.output(tuple(outputs))
    for old, new in values.items():
        new.meta = {key: value for key, value in old.meta.items() if key != "val"}
        if isinstance(value := old.meta.get("val"), Tensor):
            new.meta["dims"] = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    program = Program(graph_module(unlifted, graph), inputs, dynamic_batch, info, exported.call_spec.out_spec)
    complete_meta(program)
    return program
