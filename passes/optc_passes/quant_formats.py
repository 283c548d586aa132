"""A program with each layer in a format of its own: calibrated once, then made as often as the search needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from optc import Change, ModelInfo, PassContext, Program, Skip
from optc.rewrite import DEQUANTIZERS, argument, calls, complete_meta, constant_of, is_call, shape
from optc_passes.calibration import Batch
from optc_passes.quant_bias import correct_bias
from optc_passes.quant_blocks import Rounded
from optc_passes.quant_local import local_formats
from optc_passes.quant_noise import NoiseMeter, output_sqnr
from optc_passes.quant_plan import ATTENTION, CONVS, FLOAT_OPS, LINEARS, RULE, Layer, Plan, make_plan
from optc_passes.quant_pt2e import calibrate, convert, prepare
from optc_passes.quant_reach import reach
from optc_passes.quant_split import split_composites
from optc_passes.quantizer import Int8Kernels
from optc_passes.torchao_pt2e import ObserverBase

INT8, FLOAT = RULE, "float"

Formats = Mapping[str, str]
"""By name of a layer's node, the name of its format."""


@dataclass(frozen=True)
class Attempt:
    """A quantized program, what was done to its layers, and the SQNR of its outputs on calibration data, in dB.

    Attributes:
        attention: whether attention could have its queries and keys in int8.
    """

    program: Program
    layers: tuple[Change, ...]
    sqnr: float
    attention: bool


class LayerFormats:
    """The layers of a program that can be quantized, and what it becomes with each in a given format.

    Args:
        program: left as it is.
        context: its calibration batches are seen once, here.
        observer: constructor of the activation observers.
        block: weights that share a scale in formats with blocks.

    Attributes:
        block: weights that share a scale in formats with blocks.
        plan: every layer in int8; the names of its layers are those of :data:`Formats`.
        kernels: what the target's int8 kernels take.
        local: formats other than static int8, by name.
        corrects_bias: whether static int8 layers get their bias corrected; layers with weights in blocks always do.
        attention: whether static int8 goes with queries and keys of attention in int8.
    """

    def __init__(self, program: Program, context: PassContext, observer: Any, block: int = 128) -> None:
        self._program, self._observer, self.block = program, observer, block
        self.kernels = Int8Kernels.of(context)
        self.local = local_formats(block, self.kernels.weight_limit)
        self.corrects_bias = False
        self.attention = self.kernels.attention
        self._observers: dict[str, ObserverBase] = {}
        self._work = split_composites(program.fork())
        self.plan: Plan = make_plan(self._work, attention=self.attention)
        self.batches: list[Batch] = []
        self._references: list[Batch] = []
        self._meter: NoiseMeter | None = None
        self._has_data = True

    @property
    def names(self) -> list[str]:
        """The layers, in graph order."""
        return [layer.node.name for layer in self.plan.layers]

    def calibrate(self, context: PassContext) -> None:
        """Find the ranges of activations. Without calibration data only formats of weights can be had.

        Raises:
            DataError: a batch cannot be used.
            OptcError: the float program gives NaN or Inf.
        """
        if context.calibration is None:
            self._has_data = False  # example inputs may be noise: nothing is fitted to them
            self.batches = [self._program.example_inputs]
            self._references = [self._program.run(*batch) for batch in self.batches]
            return
        work = split_composites(self._program.fork())
        plan = make_plan(work, attention=self.attention)
        prepared, self._observers = prepare(work, plan, self._observer, self.kernels)
        self.batches, self._references = calibrate(prepared, context.calibration, context)

    def refusal(self, name: str, form: str) -> str | None:
        """Why a layer cannot have a format, or ``None``."""
        if form not in self.local:
            return None
        layer = next(layer for layer in self.plan.layers if layer.node.name == name)
        weight = constant_of(self._work, layer.weight)
        assert weight is not None, "layers of a plan have constant weights"
        return self.local[form].refusal(layer.node, weight)

    def noise(self, formats: Mapping[str, tuple[str, ...]], with_outputs: bool = False) -> dict[tuple[str, str], float]:
        """SQNR in dB of each layer's output when that layer alone has a format, by (name, format).

        One forward pass of the float program, in which every layer is computed once more for each format asked for.
        Attempts that follow know from it how to round weights in blocks and by how much means move.

        Args:
            with_outputs: estimate what that does to the model's outputs as well, for :attr:`output_noise`.
        """
        work = split_composites(self._program.fork())
        plan = make_plan(work)
        batch = self._one_batch()
        outputs = reach(work, plan.layers, batch) if with_outputs else None
        self._meter = NoiseMeter(work.module, plan, self._observers, formats, self.local, outputs, self._has_data)
        with torch.no_grad():
            self._meter.run(*batch)
        return self.own_noise

    def _one_batch(self) -> Batch:
        """All samples kept, where the program takes them together: a batch may be of a single one."""
        if not self._program.dynamic_batch:
            return self.batches[0]
        return tuple(torch.cat(column) for column in zip(*self.batches, strict=True))

    @property
    def own_noise(self) -> dict[tuple[str, str], float]:
        """What :meth:`noise` found, for biases as attempts now have them."""
        assert self._meter is not None, "noise() comes first"
        return self._meter.sqnr if self.corrects_bias else {**self._meter.sqnr, **self._meter.uncorrected[0]}

    @property
    def output_noise(self) -> dict[tuple[str, str], float]:
        """SQNR in dB of the model's outputs, estimated, when one layer has a format; empty if not asked for."""
        if self._meter is None:
            return {}
        return self._meter.outputs if self.corrects_bias else {**self._meter.outputs, **self._meter.uncorrected[1]}

    def attempt(self, formats: Formats, attention: bool = True) -> Attempt:
        """The program with each layer in its format (in float if it has none), and how far its outputs move.

        Args:
            attention: whether attention goes with static int8 layers, unless it was given back.
        """
        static = {name for name, form in formats.items() if form == INT8}
        work = self._program.fork()
        if static or not {node.name for node in calls(work, *CONVS, *LINEARS)}.issuperset(formats):
            split_composites(work)
        changes = []
        for node in calls(work, *CONVS, *LINEARS):
            form = formats.get(node.name, FLOAT)
            shift = self._meter.shifts.get((node.name, form)) if self._meter else None
            if shift is not None and (form != INT8 or self.corrects_bias):
                correct_bias(work, node, shift)
            if form in self.local:
                changes.append(self.local[form].store(work, node, self._rounded(work, node, form)))
        work.module.recompile()
        if static:
            plan = make_plan(work, in_float=set(self.names) - static, attention=attention and self.attention)
            prepared, _ = prepare(work, plan, self._observer, self.kernels, self._observers)
            changes += [Change(INT8, layer.node.name, str(layer.weight.target)) for layer in plan.layers]
            changes += [Change(INT8, node.name, "queries and keys") for node in plan.attention]
            work = convert(prepared, plan, self._program)
        sqnr = output_sqnr(work, self.batches, self._references)
        return Attempt(work, tuple(changes), sqnr, attention and self.attention)

    def give_back_attention(self) -> bool:
        """Leave attention in float from now on; returns whether that changes anything."""
        changes = self.attention and bool(self.plan.attention)
        self.attention = False
        return changes

    def skipped(self, attempt: Attempt | None) -> tuple[Skip, ...]:
        """What is no layer, or none that can be quantized, and stays in float in an attempt."""
        done = {change.node for change in attempt.layers} if attempt else set()
        had_room = self.attention if attempt is None else attempt.attention
        reason = FLOAT_OPS[ATTENTION] if had_room else "given back to float: the budget has no room for its noise"
        left = [node.name for node in self.plan.attention if node.name not in done]
        return (*self.plan.skipped, *(Skip(INT8, name, reason) for name in left))

    def _rounded(self, program: Program, node: fx.Node, form: str) -> Rounded:
        """What a local format stores of a layer's weight."""
        known = self._meter.rounded.get((node.name, form)) if self._meter else None
        weight = constant_of(program, argument(node, "weight"))
        assert weight is not None, "layers of a plan have constant weights"
        return known or self.local[form].rounded(weight.new_empty(0, weight.shape[-1]), weight)

    def with_better_bias(self, formats: Formats, plain: Attempt) -> Attempt:
        """``plain`` or the same with corrected biases, whichever moves the outputs less; later attempts do likewise.

        Correction helps most networks a little and harms some (MobileNetV3), so that it has to be tried.
        """
        self.corrects_bias = True
        corrected = self.attempt(formats)
        self.corrects_bias = corrected.sqnr > plain.sqnr
        return corrected if self.corrects_bias else plain

    def alone(self, layer: Layer, form: str, batch: int) -> Program:
        """A program of one layer and its rectifier in a format, to be measured.

        Static int8 convolutions read and write integers, as they do between others; linear layers read and write float.
        The batch varies where the model's does, as runtimes fuse otherwise where they know it; not where the layer's
        rows are parts of images, which have their fixed number.

        Args:
            batch: images in a query.
        """
        graph, root = fx.Graph(), torch.nn.Module()
        operands = dict.fromkeys((layer.activation, *layer.node.all_input_nodes))
        constants = {node: value for node in operands if (value := constant_of(self._work, node)) is not None}
        inputs = [node for node in operands if node not in constants]  # the activation, and a residual if one is added
        images = len(self._program.example_inputs[0])
        varies = self._program.dynamic_batch and all(shape(node)[0] == images for node in inputs)
        sizes = [
            (shape(node) if varies else (max(1, shape(node)[0] * batch // images), *shape(node)[1:])) for node in inputs
        ]
        examples = tuple(torch.randn(*size) for size in sizes)
        values = {node: graph.placeholder(f"x{number}") for number, node in enumerate(inputs)}
        for node, value in constants.items():
            root.register_buffer(node.name, value)
            values[node] = graph.get_attr(node.name)
        for node in dict.fromkeys((layer.node, layer.tail)):
            values[node] = graph.node_copy(node, values.__getitem__)
            del values[node].meta["val"]
        graph.output((values[layer.tail],))
        module = fx.GraphModule(root, graph, class_name="Program").eval()
        program = Program(module, examples, varies, ModelInfo(layer.node.name))
        complete_meta(program)
        if form in self.local:
            node = values[layer.node]
            self.local[form].store(program, node, self._rounded(program, node, form))
            module.recompile()
            complete_meta(program)
        elif form == INT8:
            plan = make_plan(program)
            prepared, _ = prepare(program, plan, self._observer, self.kernels)
            prepared(*examples)
            program = convert(prepared, plan, program)
            if layer.is_conv:
                program = _between_integers(program, examples[0])
        return program


def _between_integers(program: Program, example: Tensor) -> Program:
    """The program without the quantization of its input and the dequantization of its output; in place."""
    graph = program.graph
    (source,) = graph.find_nodes(op="placeholder")
    (quantize,) = source.users
    output = graph.output_node()
    (result,) = output.all_input_nodes
    with torch.no_grad():
        integers = quantize.target(example, *quantize.args[1:])
    quantize.replace_all_uses_with(source)
    graph.erase_node(quantize)
    if is_call(result, *DEQUANTIZERS):
        output.args = ((result.args[0],),)
        graph.erase_node(result)
    for node in graph.nodes:
        node.meta.pop("val", None)
    program.module.recompile()
    made = replace(program, example_inputs=(integers,))
    complete_meta(made)
    return made
