"""torchao's PT2E flow on a Program: prepare, calibrate, convert, and back to a flat Program."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from optc import Calibration, DataError, OptcError, PassContext, Program
from optc.rewrite import argument, calls, constant_of, is_call
from torch import Tensor, fx
from torchao.quantization.pt2e import ObserverBase
from torchao.quantization.pt2e.prepare import prepare as insert_observers
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from optc_passes.quant_noise import Batch
from optc_passes.quant_plan import DEQUANTIZERS, Plan, aten
from optc_passes.quantizer import ANNOTATION, Int8Quantizer

CHECKED_SAMPLES = 16
"""Calibration samples kept to compare the quantized program on; running it in PyTorch costs several float passes."""
_META_OF_PT2E = (ANNOTATION, "from_node", "_numeric_debug_handle")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torchao's and torch.ao's remarks on their own internals from the user."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.ao")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torchao|torch\.ao)\b")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def prepare(
    program: Program, plan: Plan, observer: Any, observed: Mapping[str, ObserverBase] | None = None
) -> tuple[fx.GraphModule, dict[str, ObserverBase]]:
    """The program with observers in place, and those observers by the name of the value each looks at.

    This is ``prepare_pt2e`` without its batch-norm folding, which also folds into a convolution whose output is used
    elsewhere and so changes what the model computes; optc folds batch norms in passes of their own.

    Args:
        program: used up: its graph gets the annotations and observers.
        observer: constructor of the activation observer.
        observed: observers of an earlier preparation, used again by name of the value.
    """
    quantizer = Int8Quantizer(program, plan, observer, observed)
    with quiet():
        quantizer.annotate(program.module)
        prepared = insert_observers(program.module, {}, False, quantizer.prepare_obs_or_fq_callback)
    return prepared, quantizer.observers


@torch.no_grad()
def calibrate(
    prepared: fx.GraphModule, calibration: Calibration, context: PassContext
) -> tuple[list[Batch], list[Batch]]:
    """Show every batch to the observers; returns the first few batches and the float outputs for them.

    Raises:
        DataError: there are no batches, or one does not fit the program or holds NaN or Inf.
        OptcError: the float program itself gives NaN or Inf.
    """
    inputs = len(prepared.graph.find_nodes(op="placeholder"))
    total = operator.length_hint(calibration, 0)
    batches: list[Batch] = []
    outputs: list[Batch] = []
    for number, batch in enumerate(calibration, 1):
        context.progress(f"calibrating {number}/{total}" if total else f"calibrating {number}")
        what = f"calibration batch {number} of '{calibration.description}'"
        if len(batch) != inputs:
            raise DataError(f"{what} has {len(batch)} tensors, the model takes {inputs}", "give one per model input")
        if not all(bool(tensor.isfinite().all()) for tensor in batch):
            raise DataError(f"{what} holds NaN or Inf", "clean the data")
        result = prepared(*batch)
        if not all(bool(tensor.isfinite().all()) for tensor in result):
            raise OptcError(f"the unquantized model gives NaN or Inf on {what}", "check the model's weights")
        if sum(len(kept[0]) for kept in batches) < CHECKED_SAMPLES:
            batches.append(tuple(batch))
            outputs.append(result)
    if not batches:
        raise DataError(f"calibration data '{calibration.description}' holds no batch", "give at least one")
    return batches, outputs


@torch.no_grad()
def convert(prepared: fx.GraphModule, plan: Plan, program: Program) -> Program:
    """A Program with quantize/dequantize operators and constants stored as integers under their old names.

    Args:
        prepared: a calibrated module; used up.
        plan: what it was prepared with.
        program: gives everything but the graph and its constants.
    """
    names = {layer.node.name: [layer.weight, layer.bias] for layer in plan.layers}
    names = {name: [str(node.target) for node in nodes if node is not None] for name, nodes in names.items()}
    with quiet():
        converted = convert_pt2e(prepared)
    renamed = {}
    for node in converted.graph.nodes:
        for position, name in enumerate(names.get(node.name, ())):
            dequantize = node.args[1 + position]
            for source, suffix in zip(dequantize.args[:3], ("", "_scale", "_zero_point"), strict=True):
                renamed[source.target] = name + suffix
    _ask_integers_for_sizes(converted.graph)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(converted.graph, values))
    constants = {}
    for old, new in values.items():
        new.meta = {key: value for key, value in old.meta.items() if key not in _META_OF_PT2E}
        if old.op == "get_attr":
            new.meta.pop("val", None)
            new.target = renamed.get(old.target, old.target)
            constants[new.target] = constant_of(replace(program, module=converted), old)
    return replace(program, module=fx.GraphModule(constants, graph, class_name="Program").eval())


def _ask_integers_for_sizes(graph: fx.Graph) -> None:
    """Let ``sym_size`` look at the integers: as a user of a dequantize it would keep runtimes from fusing that."""
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        if is_call(node.args[0], *DEQUANTIZERS):
            node.replace_input_with(node.args[0], node.args[0].args[0])
