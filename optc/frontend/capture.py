"""Capture: an ``nn.Module`` becomes a Program through ``torch.export``."""

from __future__ import annotations

import logging
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from optc.errors import CaptureError
from optc.evaluation import evaluation_mode
from optc.frontend.batch_sizes import (
    CONDITIONS,
    compare_with_model,
    model_outputs,
    refuse_limits,
    refuse_other_paths,
    takes_one_batch,
)
from optc.program import ModelInfo, Program, complete_meta, graph_module
from optc.rewrite import argument, calls, set_argument, shape

aten = torch.ops.aten
_ONE_AT_A_TIME = threading.RLock()
"""torch.export keeps state of the process's while it traces."""


def capture(
    model: torch.nn.Module,
    example_inputs: Sequence[Tensor],
    dynamic_batch: bool = True,
    info: ModelInfo | None = None,
) -> Program:
    """Capture a model as a flat functional ATen graph.

    Args:
        model: captured in eval mode (its training flags are restored); its parameters are shared with the program, not
            copied.
        example_inputs: one tensor per positional argument, batch first.
        dynamic_batch: let dimension 0 of every input vary. Where that cannot be, the model is captured for the batch
            size of ``example_inputs``; then ``program.dynamic_batch`` is false and ``info.notes`` says why.
        info: where the model came from, kept with the program.

    Raises:
        CaptureError: torch.export cannot capture the model; carries its reason and the line of the model's code.
    """
    given = checked_inputs(model, example_inputs)
    info = info or ModelInfo(name=type(model).__name__)
    with evaluation_mode(model), torch.no_grad(), _quiet():
        if dynamic_batch:
            # A tensor of its own for each, as the exporter marks it as dynamic for good.
            inputs = tuple(torch.cat([t, t]) if t.shape[0] == 1 else t.detach() for t in given)
            try:
                _refuse_fixed_batch(model)
                # The exporter takes for granted that no size is 1.
                single = [tensor[:1] for tensor in inputs]
                wanted = model_outputs(model, single)
                shapes = torch.export.ShapesCollection()
                for tensor in inputs:
                    shapes[tensor] = {0: Dim.DYNAMIC}
                exported = torch.export.export(model, inputs, dynamic_shapes=shapes.dynamic_shapes(model, inputs))
                refuse_other_paths(exported.graph)
                program = program_from_exported(exported, inputs, True, info)
                compare_with_model(wanted, program, single, "for a batch of 1")
                return program
            except Exception as error:
                dynamic_error = error
        try:
            wanted = model_outputs(model, given)
            exported = torch.export.export(model, given)
            program = program_from_exported(exported, given, False, info)
            compare_with_model(wanted, program, given, "for the example inputs")
        except Exception as error:
            raise capture_error(model, error) from error
    if dynamic_batch:
        note = (
            f"captured for batch size {given[0].shape[0]} only, the batch cannot vary: {_reason(dynamic_error)}"
            f"{_place(dynamic_error)}"
        )
        program = replace(program, info=replace(info, notes=(*info.notes, note)))
    return program


def checked_inputs(model: torch.nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A model's example inputs as a tuple.

    Raises:
        CaptureError: they, or the model, are no such thing as can be captured.
    """
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"the model is a {type(model).__name__}", "give a torch.nn.Module")
    if not isinstance(inputs, (tuple, list)) or not inputs:
        raise CaptureError(f"the example inputs are a {type(inputs).__name__}", "give a tuple of tensors")
    for number, tensor in enumerate(inputs, 1):
        if not isinstance(tensor, Tensor):
            raise CaptureError(f"input {number} is a {type(tensor).__name__}", "give one tensor per argument")
        if tensor.ndim == 0:
            raise CaptureError(
                f"input {number} has no batch dimension", "give it a first dimension, one value a sample"
            )
        if tensor.shape[0] == 0:
            raise CaptureError(f"input {number} is an empty batch", "give at least one sample")
    return tuple(inputs)


def program_from_exported(
    exported: ExportedProgram, inputs: tuple[Tensor, ...], dynamic_batch: bool, info: ModelInfo
) -> Program:
    """A Program from an ExportedProgram: functionalised, flat inputs and outputs, static example shapes in meta.

    What a model writes into its inputs is in the graph's values, and the inputs stay as they are.

    Raises:
        CaptureError: it writes to its buffers when called, or returns something else than tensors.
    """
    exported = exported.run_decompositions({})
    if state := exported.graph_signature.buffers_to_mutate:
        names = ", ".join(dict.fromkeys(state.values()))
        raise CaptureError(f"each call changes its state ({names})", "make it return what it now keeps in buffers")
    unlifted = exported.module(check_guards=False)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(unlifted.graph, values)
    leaves: list[Any] = pytree.tree_leaves(unlifted.graph.output_node().args[0])
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, fx.Node) or isinstance(leaf.meta.get("val"), _NUMBERS):
            kind = "a number" if isinstance(leaf, fx.Node) else repr(leaf)
            raise CaptureError(f"its output {number} is {kind}, not a tensor", "make it return tensors only")
    graph.output(tuple(values[leaf] for leaf in leaves))
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        node.replace_all_uses_with(node.args[1])
        graph.erase_node(node)
    for old, new in values.items():
        new.meta = {key: value for key, value in old.meta.items() if key != "val"}
        if isinstance(value := old.meta.get("val"), torch.Tensor):
            sizes: list[Any] = list(value.shape)
            new.meta["dims"] = tuple(size if isinstance(size, int) else str(size) for size in sizes)
    program = Program(graph_module(unlifted, graph), inputs, dynamic_batch, info, exported.call_spec.out_spec)
    complete_meta(program)
    _number_paddings(program)
    return program


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
_WORDED = {getattr(aten, name).padding: getattr(aten, name).default for name in ("conv1d", "conv2d", "conv3d")}


def _number_paddings(program: Program) -> None:
    """Write ``"same"`` and ``"valid"`` as numbers, in place; what pads one side more than the other has none."""
    for node in calls(program, *_WORDED):
        weight, word, dilation = (argument(node, name) for name in ("weight", "padding", "dilation"))
        kernel = shape(weight)[2:]
        steps = list(dilation) * (len(kernel) // len(dilation))
        total = [step * (size - 1) if word == "same" else 0 for size, step in zip(kernel, steps, strict=True)]
        if not any(pad % 2 for pad in total):
            node.target = _WORDED[node.target]
            set_argument(node, "padding", [pad // 2 for pad in total])
    program.module.recompile()


def _refuse_fixed_batch(model: torch.nn.Module) -> None:
    """Exported again, a graph exported for one batch size may seem to take any, with that size baked into constants."""
    if isinstance(model, fx.GraphModule):
        if takes_one_batch(model, ()):
            raise CaptureError("it was exported for one batch size")
        refuse_limits(model.graph, model.meta.get(CONDITIONS, ()))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep off the terminal what torch says to its own developers during an export; errors are raised, not logged."""
    from torch.export import (
        _trace,
    )  # brings all of torch's compiler along: a second, so only when something is exported

    loggers = [logging.getLogger(f"torch.{name}") for name in ("_subclasses.fake_tensor", "fx.experimental", "_export")]
    with _ONE_AT_A_TIME:
        levels = [logger.level for logger in loggers]
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        # It prints the half-made graph of a failed export; shadowing its print leaves everybody else's stderr alone.
        vars(_trace)["print"] = lambda *args, **kwargs: None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
                yield
        finally:
            vars(_trace).pop("print", None)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def capture_error(model: torch.nn.Module, error: Exception) -> CaptureError:
    """What a model raised when it was run or exported, with the line of its code, as one line for people."""
    hint = "make it independent of tensor values (torch.where, torch.cond)" if _depends_on_data(error) else ""
    return CaptureError(f"cannot capture {type(model).__name__}: {_reason(error)}{_place(error)}", hint)


def _reason(error: Exception) -> str:
    """The exporter's own reason, without its advice to people who debug torch."""
    if _depends_on_data(error):
        return "its control flow or shapes depend on tensor values"
    if str(error).startswith("Constraints violated"):
        return "the model's code fixes its size"
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line.split(" For more information, run with")[0] for line in lines if line), type(error).__name__)


def _depends_on_data(error: Exception) -> bool:
    return type(error).__name__ in ("GuardOnDataDependentSymNode", "PendingUnbackedSymbolNotFound")


def _place(error: Exception) -> str:
    """`` (file:line, source)`` of the innermost frame that is neither torch's nor optc's, or nothing."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*ours, "<"))]
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""
