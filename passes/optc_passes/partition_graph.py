"""A graph as units of work in a row: what each cut between them would carry, and what memory each unit needs."""

from __future__ import annotations

import heapq
import math
import operator
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from optc import Program
from optc.rewrite import dims

aten = torch.ops.aten
_SIZES = (aten.sym_size.int, aten.sym_numel.default)
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Unit:
    """A node and the ``getitem`` nodes that take its result apart: a stage holds all of it or nothing."""

    nodes: tuple[fx.Node, ...]

    @property
    def values(self) -> list[fx.Node]:
        """The tensors it makes."""
        return [node for node in self.nodes if isinstance(node.meta.get("val"), Tensor)]


class Work:
    """What there is to be cut: the units in the graph's order, and what every stage makes for itself.

    Attributes:
        units: everything that depends on an input's contents.
        free: nodes that do not (constants, what is made of them, sizes): each stage that reads one has its own.
        constants: for each unit, the names of the constants that it reads, directly or through free nodes.
        sizes: by constant, its storage and that storage's bytes: tied weights have one.
    """

    def __init__(self, program: Program, batch: int) -> None:
        self._program = program
        self._scale = batch / len(program.example_inputs[0]) if program.dynamic_batch else 1.0
        self.free = _free(program)
        self.units = tuple(_units(program, self.free))
        self.outputs = {node for node in program.graph.output_node().all_input_nodes if node not in self.free}
        self.inputs = list(program.graph.find_nodes(op="placeholder"))
        self.sizes: dict[str, tuple[int, int]] = {}
        for name, tensor in program.constants():
            storage = tensor.untyped_storage()
            self.sizes[name] = storage.data_ptr() or id(tensor), storage.nbytes()
        behind: dict[fx.Node, frozenset[str]] = {}
        for node in program.graph.nodes:
            if node in self.free:
                own = [str(node.target)] if node.op == "get_attr" else []
                sources = node.all_input_nodes if node.target not in _SIZES else []
                behind[node] = frozenset(own).union(*(behind[each] for each in sources))
        self.constants = {
            unit: frozenset[str]().union(
                *(behind[each] for node in unit.nodes for each in node.all_input_nodes if each in behind)
            )
            for unit in self.units
        }

    def bytes(self, node: fx.Node) -> int:
        """Bytes of a node's tensors for one microbatch."""
        value = node.meta.get("val")
        tensors = [each for each in (value if isinstance(value, (tuple, list)) else (value,)) if hasattr(each, "dtype")]
        return sum(round(math.prod(map(int, each.shape)) * self._scale) * each.dtype.itemsize for each in tensors)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """A tensor's shape for one microbatch; where it is not known what varies, the first size is taken for it."""
        sizes = [int(size) for size in node.meta["val"].shape]
        known = dims(node) or ("batch", *sizes[1:])
        varies = [isinstance(each, str) for each in known]
        return tuple(round(size * self._scale) if vary else size for size, vary in zip(sizes, varies, strict=True))

    def cannot_be_sent(self, node: fx.Node) -> bool:
        """Whether a value is no tensor, or does not have the batch in exactly one dimension."""
        if not isinstance(node.meta.get("val"), Tensor):
            return True
        known = dims(node)
        return self._program.dynamic_batch and known is not None and sum(isinstance(each, str) for each in known) != 1

    def constant_bytes(self, names: Iterable[str]) -> int:
        """Bytes of those constants, a storage that several share counted once."""
        return sum(dict(self.sizes[name] for name in names).values())


@dataclass(frozen=True)
class Row:
    """The units in one order, and what that order means for cuts; cut ``c`` lies before unit ``c``.

    Attributes:
        carried: (units + 1), bytes of all values alive at a cut, for one microbatch.
        possible: (units + 1), whether everything alive there can be handed on.
        live: (units), bytes of values in memory while the unit runs: what is alive before it and what it makes. A view
            takes no memory of its own.
    """

    work: Work
    units: tuple[Unit, ...]
    carried: Integers
    possible: NDArray[np.bool_]
    live: Integers

    def crossing(self, cut: int) -> list[fx.Node]:
        """The values alive at a cut, in the order in which they are made."""
        lives = _lives(self.work, self.units)
        return [node for node, (begin, end) in lives.items() if begin < cut <= end]

    def weights(self, begin: int, end: int) -> int:
        """Bytes of the constants that the units from ``begin`` up to ``end`` read."""
        return self.work.constant_bytes({name for unit in self.units[begin:end] for name in self.work.constants[unit]})

    def earliest(self, limit: int | None) -> Integers:
        """For each cut where a stage ends, the earliest one where it may begin to hold ``limit`` bytes at most.

        A stage holds its constants, each storage once, and the most that is ever alive in it. Two pointers and a queue
        of falling maxima: linear in units and constants.
        """
        result = np.zeros(len(self.units) + 1, np.int64)
        if limit is None:
            return result
        uses: Counter[int] = Counter()
        peaks: deque[int] = deque()
        begin = weight = 0
        for end, unit in enumerate(self.units, 1):
            for storage, size in {self.work.sizes[name] for name in self.work.constants[unit]}:
                weight += size if not uses[storage] else 0
                uses[storage] += 1
            while peaks and self.live[peaks[-1]] <= self.live[end - 1]:
                peaks.pop()
            peaks.append(end - 1)
            while begin < end and weight + int(self.live[peaks[0]]) > limit:
                for storage, size in {self.work.sizes[name] for name in self.work.constants[self.units[begin]]}:
                    uses[storage] -= 1
                    weight -= size if not uses[storage] else 0
                begin += 1
                while peaks and peaks[0] < begin:
                    peaks.popleft()
            result[end] = begin
        return result


def row(work: Work, units: Sequence[Unit]) -> Row:
    """What an order of the units means for cuts; linear in nodes."""
    count = len(units)
    carried, stuck, live = (np.zeros(count + 2, np.int64) for _ in range(3))
    roots: dict[fx.Node, fx.Node] = {}
    spans: dict[fx.Node, tuple[int, int]] = {}
    for node, (begin, end) in _lives(work, units).items():
        carried[begin + 1] += work.bytes(node)
        carried[end + 1] -= work.bytes(node)
        if work.cannot_be_sent(node):
            stuck[begin + 1] += 1
            stuck[end + 1] -= 1
    for node, (begin, end) in _lives(work, units, taken_apart=True).items():
        root = roots[node] = _root(node, roots)
        first, last = spans.get(root, (begin, end))
        spans[root] = first, max(last, end)
    for node, (begin, end) in spans.items():
        size = work.bytes(node) if node not in work.free else 0
        live[max(begin, 0)] += (
            size  # from the unit that makes it, the model's inputs from the first, to its last reader
        )
        live[min(end, count - 1) + 1] -= size
    return Row(work, tuple(units), carried.cumsum()[:-1], stuck.cumsum()[:-1] == 0, live.cumsum()[:count])


def _root(node: fx.Node, roots: dict[fx.Node, fx.Node]) -> fx.Node:
    """The node whose memory a value lies in."""
    if node.target is operator.getitem or getattr(node.target, "is_view", False):
        source = node.all_input_nodes[0]
        return roots.get(source, source)
    return node


def _lives(work: Work, units: Sequence[Unit], taken_apart: bool = False) -> dict[fx.Node, tuple[int, int]]:
    """For each value (begin, end): the unit that makes it, -1 for the model's inputs, and the last one that reads it.

    An output of the model lives to the end. Values nothing reads are left out.

    Args:
        taken_apart: with those that only ``getitem`` nodes read.
    """
    place = {node: index for index, unit in enumerate(units) for node in unit.nodes}
    found = {}
    for node in (*work.inputs, *place):
        readers = [place[user] for user in node.users if user in place]
        begin = place.get(node, -1)
        end = len(units) if node in work.outputs else max(readers, default=-1)
        if end > begin or (taken_apart and end == begin):
            found[node] = begin, end
    return found


def _free(program: Program) -> set[fx.Node]:
    free: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "get_attr" or (
            node.op == "call_function" and (node.target in _SIZES or all(each in free for each in node.all_input_nodes))
        ):
            free.add(node)
    return free


def _units(program: Program, free: set[fx.Node]) -> Iterator[Unit]:
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in free and node.target is not operator.getitem:
            nodes = [node]
            for each in nodes:
                nodes += [user for user in each.users if user.target is operator.getitem]
            yield Unit(tuple(nodes))


def few_alive(work: Work) -> tuple[Unit, ...]:
    """An order that keeps few bytes alive: of the units that can run, always the one that frees most or adds least.

    Greedy list scheduling with a heap, O((n + edges) log n); ties are settled by the graph's order.
    """
    home = {node: unit for unit in work.units for node in unit.nodes}
    number = {unit: index for index, unit in enumerate(work.units)}
    reads = {unit: _operands(unit, home, work) for unit in work.units}
    left = {unit: sum(value in home for value in values) for unit, values in reads.items()}
    readers: dict[fx.Node, set[Unit]] = {}
    for unit, values in reads.items():
        for value in values:
            readers.setdefault(value, set()).add(unit)

    def growth(unit: Unit) -> int:
        made = sum(work.bytes(value) for value in unit.values if value in readers or value in work.outputs)
        freed = (value for value in reads[unit] if len(readers[value]) == 1 and value not in work.outputs)
        return made - sum(map(work.bytes, freed))

    heap = [(growth(unit), number[unit], unit) for unit in work.units if not left[unit]]
    heapq.heapify(heap)
    order: list[Unit] = []
    done: set[Unit] = set()
    while heap:
        _, _, unit = heapq.heappop(heap)
        if unit in done:
            continue
        done.add(unit)
        order.append(unit)
        for value in reads[unit]:
            readers[value].discard(unit)
            if len(readers[value]) == 1:  # the last reader now frees it
                (last,) = readers[value]
                if not left[last] and last not in done:
                    heapq.heappush(heap, (growth(last), number[last], last))
        for value in unit.nodes:
            for reader in list(readers.get(value, ())):
                left[reader] -= 1
                if not left[reader]:
                    heapq.heappush(heap, (growth(reader), number[reader], reader))
    return tuple(order)


def _operands(unit: Unit, home: dict[fx.Node, Unit], work: Work) -> set[fx.Node]:
    """What a unit reads of other units and of the model's inputs, be it only its size."""
    pending = [each for node in unit.nodes for each in node.all_input_nodes]
    seen: set[fx.Node] = set()
    while pending:
        each = pending.pop()
        if each not in seen:
            seen.add(each)
            pending += each.all_input_nodes if each in work.free else ()
    return {each for each in seen if each not in work.free and home.get(each) is not unit}
