"""A program whose nodes have stages (``node.meta["stage"]``), as one program for each stage and what they hand on.

Each stage hands values to the next one only, as pipeline stages do; what is read later goes through those between. What
depends on no input of the model (weights, masks made of them, tensors filled with a number) is not handed on but made
anew in each stage that reads it, and so are numbers such as the batch size.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from optc.errors import OptcError
from optc.program import Program, complete_meta, graph_module
from optc.rewrite import loosen_layout

aten = torch.ops.aten
_SIZES = (aten.sym_size.int, aten.sym_numel.default)


@dataclass(frozen=True)
class Wire:
    """A value on its way from one stage to the next, batch first where the batch may vary.

    Attributes:
        name: of the node that made it; of a model's output, ``output_<i>``.
        shape: sizes, ``None`` for the batch where it may vary.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def sizes(self, batch: int) -> tuple[int, ...]:
        """The shape at a batch size."""
        return tuple(batch if size is None else size for size in self.shape)

    def batched(self, batch: int) -> tuple[int, ...]:
        """The shape with so many images, also where the program takes fewer at a time."""
        return (batch, *self.sizes(batch)[1:])

    def bytes(self, batch: int) -> int:
        """Size in bytes at a batch size."""
        return int(torch.Size(self.sizes(batch)).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class Stage:
    """One stage: a program of its own, whose inputs are ``receives`` and whose outputs are ``sends``.

    The first stage receives the model's inputs, the last one sends its outputs. The program holds only the constants
    that the stage reads; its example inputs are what the stage before sends for the whole program's.
    """

    index: int
    program: Program
    receives: tuple[Wire, ...]
    sends: tuple[Wire, ...]


def stage_count(program: Program) -> int:
    """How many stages the program is cut into; 1 if it is not cut."""
    return 1 + max((node.meta.get("stage", 0) for node in program.graph.nodes), default=0)


def split(program: Program) -> tuple[Stage, ...]:
    """Cut a program at its nodes' stages. The tensors are shared; the graph is run once on the example inputs.

    Raises:
        OptcError: a node has no stage, reads what a later stage makes, or hands on something other than tensors with
            one batch in them; names the node.
    """
    plan = _Plan(program)
    stages: list[Stage] = []
    inputs = program.example_inputs
    for index in range(plan.count):
        module = graph_module(program.module, plan.graph(index))
        part = replace(program, module=module, example_inputs=inputs, output_spec=None, history=())
        complete_meta(part)
        outputs = tuple(_dense(output) for output in part.run(*inputs))
        sends = tuple(
            _wire(name, tensor, program.dynamic_batch) for name, tensor in zip(plan.sent(index), outputs, strict=True)
        )
        names = [node.name for node in plan.received(index)]
        receives = tuple(_wire(name, each, program.dynamic_batch) for name, each in zip(names, inputs, strict=True))
        stages.append(Stage(index, part, receives, sends))
        inputs = outputs
    return tuple(stages)


def run_stages(stages: Sequence[Stage], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run stage after stage in eager PyTorch, each on nothing but what the one before it sent."""
    for stage in stages:
        inputs = tuple(_dense(output) for output in stage.program.run(*inputs))
    return inputs


def _wire(name: str, tensor: Tensor, dynamic_batch: bool) -> Wire:
    shape: tuple[int | None, ...] = tuple(tensor.shape)
    return Wire(name, (None, *shape[1:]) if dynamic_batch and shape else shape, tensor.dtype)


def _batch_symbol(program: Program) -> str:
    """What the batch is called in ``meta["dims"]``; empty where it does not vary."""
    known = next(iter(program.graph.find_nodes(op="placeholder"))).meta.get("dims") or ("batch",)
    return str(known[0]) if program.dynamic_batch else ""


def _without_stage(node: fx.Node) -> dict[str, Any]:
    return {key: value for key, value in node.meta.items() if key != "stage"}


def _dense(tensor: Tensor) -> Tensor:
    """As it arrives in another process: dense, whatever strides it left with."""
    return tensor.contiguous()


class _Plan:
    """Which stage makes each value, and which values cross each cut."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._nodes: list[fx.Node] = list(program.graph.nodes)
        self._inputs = program.graph.find_nodes(op="placeholder")
        self._outputs: tuple[Any, ...] = tuple(program.graph.output_node().args[0])  # type: ignore[arg-type]
        self._symbol = _batch_symbol(program)
        self.count = stage_count(program)
        self._free = self._find_free()
        self._stage = self._find_stages()
        self._varying = _Varying(program)
        self._crossing = self._find_crossing()

    def _find_free(self) -> set[fx.Node]:
        """Nodes that depend on no input's contents: constants and what is made of them, numbers made of sizes."""
        free: set[fx.Node] = set()
        for node in self._nodes:
            operands = node.all_input_nodes
            if node.op == "get_attr" or (
                node.op == "call_function" and (node.target in _SIZES or all(each in free for each in operands))
            ):
                free.add(node)
        return free

    def _find_stages(self) -> dict[fx.Node, int]:
        stage: dict[fx.Node, int] = dict.fromkeys(self._inputs, 0)
        for node in self._nodes:
            if node.op != "call_function" or node in self._free:
                continue
            if "stage" not in node.meta:
                raise OptcError(
                    f"node '{node.name}' ({node.target}) has no stage: a pass after partition made it",
                    "let partition be the last pass",
                )
            made = [each for each in node.all_input_nodes if each in stage]
            # One value of several stays where all were made: only tensors are handed on.
            stage[node] = stage[made[0]] if node.target is operator.getitem else int(node.meta["stage"])
            late = next((each for each in made if stage[each] > stage[node]), None)
            if late is not None:
                raise OptcError(
                    f"node '{node.name}' is in stage {stage[node]} but reads '{late.name}' of stage {stage[late]}",
                    "stages must not decrease along the graph",
                )
        empty = set(range(self.count)) - {each for node, each in stage.items() if node.op != "placeholder"}
        if empty:
            raise OptcError(f"stage {min(empty)} has no operator", "ask for fewer stages")
        return stage

    def _find_crossing(self) -> list[list[fx.Node]]:
        """For each stage but the last, what is alive behind it, in the order of the graph."""
        last = dict(self._stage)
        for node in self._nodes:
            for operand in node.all_input_nodes:
                if operand in last and node in self._stage:
                    last[operand] = max(last[operand], self._stage[node])
        for output in self._outputs:
            if output in last:
                last[output] = self.count - 1
        crossing = [
            [node for node in self._nodes if node in last and self._stage[node] <= index < last[node]]
            for index in range(self.count - 1)
        ]
        for node in {node for each in crossing for node in each}:
            self._varying.check(node)
        return crossing

    def received(self, index: int) -> list[fx.Node]:
        """The values that a stage is given."""
        return self._crossing[index - 1] if index else self._inputs

    def sent(self, index: int) -> list[str]:
        """The names of the values that a stage hands on."""
        if index == self.count - 1:
            return [f"output_{number}" for number in range(len(self._outputs))]
        return [node.name for node in self._crossing[index]]

    def graph(self, index: int) -> fx.Graph:
        """The graph of one stage."""
        builder = _Builder(self._free, self._varying, self._symbol)
        for node in self.received(index):
            builder.receive(node, as_wire=index > 0)
        builder.take_apart()
        for node in self._nodes:
            if node.op == "call_function" and self._stage.get(node) == index:
                builder.copy(node)
        if index == self.count - 1:
            builder.graph.output(fx.map_arg(self._outputs, builder.value))
        else:
            builder.graph.output(tuple(builder.send(node) for node in self._crossing[index]))
        loosen_layout(builder.loosened)
        return builder.graph


class _Builder:
    """Builds the graph of one stage."""

    def __init__(self, free: set[fx.Node], varying: _Varying, symbol: str) -> None:
        self.graph = fx.Graph()
        self._free, self._varying, self._symbol = free, varying, symbol
        self._values: dict[fx.Node, Any] = {}
        self._wires: dict[fx.Node, fx.Node] = {}
        self._batch: fx.Node | None = None
        self.loosened: list[fx.Node] = []

    def receive(self, node: fx.Node, as_wire: bool) -> None:
        """Make a placeholder for a value; wires are batch first."""
        new = self.graph.placeholder(node.name)
        self._batch = self._batch or new
        if not as_wire:
            self._values[node] = new
            new.meta = _without_stage(node)
            return
        self._wires[node] = new
        if self._symbol and "dims" in node.meta:
            axis, factor = self._varying.axis(node)
            sizes = [size for position, size in enumerate(node.meta["val"].shape) if position != axis]
            new.meta["dims"] = (self._symbol, *([] if factor == 1 else [factor]), *sizes)

    def take_apart(self) -> None:
        """Give received values the shape they had where they were made."""
        for node, wire in self._wires.items():
            axis, factor = self._varying.axis(node)
            value = wire
            if factor != 1:
                sizes = list(node.meta["val"].shape)
                rest = [size for position, size in enumerate(sizes) if position != axis]
                value = self.graph.call_function(aten.view.default, (value, [-1, *rest]))
            if axis:
                order = [*range(1, axis + 1), 0, *range(axis + 1, node.meta["val"].ndim)]
                value = self.graph.call_function(aten.permute.default, (value, order))
                value = self._contiguous(value)
            self._values[node] = value
        # Values arrive dense, whatever strides they were made with.
        loosen = {node for node in self._wires if not node.meta["val"].is_contiguous()}
        self.loosened = [self._values[node] for node in loosen]

    def copy(self, node: fx.Node) -> fx.Node:
        """Copy a node, and first what it reads of what is free to be made anywhere."""
        new = self.graph.node_copy(node, self.value)
        new.meta = _without_stage(node)
        self._values[node] = new
        return new

    def value(self, node: fx.Node) -> Any:
        """What stands for a value of the whole graph in this one."""
        if node in self._values:
            return self._values[node]
        if node not in self._free:
            raise OptcError(f"'{node.name}' is read in a stage that it does not reach", "this is a mistake in optc")
        elsewhere = [each for each in node.all_input_nodes if each not in self._values and each not in self._free]
        if node.target in _SIZES and elsewhere:
            self._values[node] = self._size(node)
            return self._values[node]
        return self.copy(node)

    def _size(self, node: fx.Node) -> fx.Node | int:
        """A size of a tensor that is in another stage: a number, or made of the batch of what was received."""
        if not self._symbol or self._batch is None:
            return int(node.meta["val"])
        new = self.graph.call_function(aten.sym_size.int, (self._batch, 0))
        factor = self._varying.number(node)
        return new if factor == 1 else self.graph.call_function(operator.mul, (new, factor))

    def send(self, node: fx.Node) -> fx.Node:
        """The value as it is handed on: batch first."""
        if node in self._wires:
            return self._wires[node]
        value: fx.Node = self.value(node)
        axis, factor = self._varying.axis(node)
        if axis:
            order = [axis, *(position for position in range(node.meta["val"].ndim) if position != axis)]
            value = self._contiguous(self.graph.call_function(aten.permute.default, (value, order)))
        if factor != 1:
            rest = [size for position, size in enumerate(node.meta["val"].shape) if position != axis]
            value = self.graph.call_function(aten.view.default, (value, [-1, factor, *rest]))
        return value

    def _contiguous(self, node: fx.Node) -> fx.Node:
        return self.graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})


class _Varying:
    """Where the batch is in each value, from the shapes at the example inputs' batch size and at another one."""

    def __init__(self, program: Program) -> None:
        self._dynamic = program.dynamic_batch
        self._batch = len(program.example_inputs[0]) if self._dynamic else 0
        self._other: dict[fx.Node, Any] = {}
        if self._dynamic and stage_count(program) > 1:
            self._propagate(program, self._batch + 1)

    def _propagate(self, program: Program, batch: int) -> None:
        mode = next(
            node.meta["val"].fake_mode for node in program.graph.nodes if isinstance(node.meta.get("val"), FakeTensor)
        )
        with mode, torch.no_grad():
            for node in program.graph.nodes:
                if node.op == "placeholder":
                    val = node.meta["val"]
                    self._other[node] = val.new_empty((batch, *val.shape[1:]))
                elif node.op == "get_attr":
                    self._other[node] = node.meta["val"]
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), self._other.__getitem__)
                    self._other[node] = node.target(*args, **kwargs)

    def check(self, node: fx.Node) -> None:
        """Refuse what cannot be handed on.

        Raises:
            OptcError: names the node.
        """
        if not isinstance(node.meta.get("val"), Tensor):
            raise OptcError(
                f"'{node.name}' ({node.target}) is read in a later stage and is no tensor", "cut the model elsewhere"
            )
        self.axis(node)

    def axis(self, node: fx.Node) -> tuple[int, int]:
        """The dimension that grows with the batch, and its size for each sample; (0, 1) where the batch is fixed."""
        if not self._dynamic:
            return 0, 1
        here, other = node.meta["val"].shape, self._other[node].shape
        varying = [position for position, (one, two) in enumerate(zip(here, other, strict=True)) if one != two]
        if len(varying) == 1:
            size, factor = int(here[varying[0]]), int(here[varying[0]]) // self._batch
            if size == factor * self._batch and int(other[varying[0]]) == factor * (self._batch + 1):
                return varying[0], factor
        raise OptcError(
            f"'{node.name}' ({node.target}) cannot be handed to another stage: it has {len(varying)} dimensions that"
            " grow with the batch, not one",
            "cut the model elsewhere, or capture it for one batch size",
        )

    def number(self, node: fx.Node) -> int:
        """A size for each sample of the batch."""
        here, other = int(node.meta["val"]), int(self._other[node])
        if here % self._batch or other != here // self._batch * (self._batch + 1):
            raise OptcError(f"the size '{node.name}' is no multiple of the batch", "cut the model elsewhere")
        return here // self._batch
