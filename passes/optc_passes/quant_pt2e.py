"""torchao's PT2E flow on a Program: prepare, calibrate, convert, and back to a flat Program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from optc import Calibration, OptcError, PassContext, Program
from optc.rewrite import DEQUANTIZERS, QUANTIZERS, constant_of, is_call
from optc_passes.calibration import Batch, checked
from optc_passes.quant_plan import Plan, aten
from optc_passes.quantizer import ANNOTATION, Int8Kernels, Int8Quantizer
from optc_passes.torchao_pt2e import ObserverBase, convert_pt2e, insert_observers, quiet

BATCH_NORM = aten._native_batch_norm_legit_no_training.default
CHECKED_SAMPLES = 8
"""Calibration samples kept to compare the quantized program on; running it in PyTorch costs several float passes."""
_META_OF_PT2E = (ANNOTATION, "from_node", "_numeric_debug_handle")


def prepare(
    program: Program,
    plan: Plan,
    observer: Any,
    kernels: Int8Kernels,
    observed: Mapping[str, ObserverBase] | None = None,
) -> tuple[fx.GraphModule, dict[str, ObserverBase]]:
    """The program with observers in place, and those observers by the name of the value each looks at.

    This is ``prepare_pt2e`` without its batch-norm folding, which also folds into a convolution whose output is used
    elsewhere and so changes what the model computes; optc folds batch norms in passes of their own.

    Args:
        program: used up: its graph gets the annotations and observers.
        observer: constructor of the activation observer.
        kernels: what the target's int8 kernels take.
        observed: observers of an earlier preparation, used again by name of the value.
    """
    quantizer = Int8Quantizer(program, plan, observer, kernels, observed)
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
        DataError: as :func:`~optc_passes.calibration.checked` does.
        OptcError: the float program itself gives NaN or Inf; names the output.
    """
    inputs = len(prepared.graph.find_nodes(op="placeholder"))
    batches: list[Batch] = []
    outputs: list[Batch] = []
    for number, batch in enumerate(checked(calibration, inputs, context), 1):
        result = prepared(*batch)
        _refuse_not_finite(result, f"calibration batch {number} of '{calibration.description}'")
        if sum(len(kept[0]) for kept in batches) < CHECKED_SAMPLES:
            batches.append(batch)
            outputs.append(result)
    return batches, outputs


def _refuse_not_finite(outputs: Batch, batch: str) -> None:
    for position, output in enumerate(outputs):
        name = f"output {position} of the unquantized model" if len(outputs) > 1 else "the unquantized model's output"
        if output.isnan().any():
            raise OptcError(f"{name} holds NaN on {batch}", "check the model's weights")
        if output.isinf().any():
            mend = "mask with a large finite number such as -1e4 where it is meant, else check the model's weights"
            raise OptcError(f"{name} holds infinities on {batch}", mend)


@torch.no_grad()
def convert(prepared: fx.GraphModule, plan: Plan, program: Program) -> Program:
    """A Program with quantize/dequantize operators and constants stored as integers under their old names.

    Args:
        prepared: a calibrated module; used up.
        plan: what it was prepared with.
        program: gives everything but the graph and its constants.
    """
    names = {
        layer.node.name: [str(node.target) for node in (layer.weight, layer.bias) if node is not None]
        for layer in plan.layers
    }
    _retarget(prepared.graph, BATCH_NORM, _batch_norm)
    with quiet():
        converted = convert_pt2e(prepared)
    _retarget(converted.graph, _batch_norm, BATCH_NORM)
    renamed: dict[str, str] = {}
    for node in list(converted.graph.nodes):
        for dequantize, name in zip(node.args[1:3], names.get(node.name, ()), strict=False):
            node.prepend(dequantize)  # at the top of the graph it would hold the float weight while the model runs
            for source, suffix in zip(dequantize.args[:3], ("", "_scale", "_zero_point"), strict=True):
                renamed[source.target] = name + suffix
    _ask_integers_for_sizes(converted.graph)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(converted.graph, values))
    constants: dict[str, Any] = {}
    result = replace(program, module=converted)
    for old, new in values.items():
        new.meta = {key: value for key, value in old.meta.items() if key not in _META_OF_PT2E}
        if old.op == "get_attr":
            new.target = renamed.get(str(old.target), str(old.target))
            constants[new.target] = constant_of(result, old)
        if old.op == "get_attr" or is_call(old, *QUANTIZERS, *DEQUANTIZERS):
            new.meta.pop("val", None)
    return replace(result, module=fx.GraphModule(constants, graph, class_name="Program").eval())


def _batch_norm(*args: object) -> object:
    """Stands for batch norms while torchao converts.

    Where it sees one, it exports 96 patterns of quantization-aware training to look for, which takes half a minute.
    """
    raise AssertionError("stands for an operator, is never called")


def _retarget(graph: fx.Graph, old: Callable[..., Any], new: Callable[..., Any]) -> None:
    for node in graph.nodes:
        if is_call(node, old):
            node.target = new


def _ask_integers_for_sizes(graph: fx.Graph) -> None:
    """Let ``sym_size`` look at the integers: as a user of a dequantize it would keep runtimes from fusing that."""
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        if is_call(node.args[0], *DEQUANTIZERS):
            node.replace_input_with(node.args[0], node.args[0].args[0])
