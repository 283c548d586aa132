"""The cut against exhaustive search, over rows of units and over whole graphs."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import optc
from optc.program import Program
from optc.stages import run_stages, split
from optc_passes.partition import Partition
from optc_passes.partition_costs import node_seconds
from optc_passes.partition_cut import Chain, cut
from optc_passes.partition_devices import Device, parse
from optc_passes.partition_graph import Row, Work, few_alive, row

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)


def best_by_trying(chain: Chain) -> float:
    """The slowest stage of the best of all cuts; infinite if none is allowed."""
    best = math.inf
    for cuts in itertools.combinations(range(1, chain.units), chain.stages - 1):
        ends = (0, *cuts, chain.units)
        fits = all(chain.earliest[stage, ends[stage + 1]] <= ends[stage] for stage in range(chain.stages))
        if fits:
            best = min(best, *(max(chain.stage_seconds(cuts)),))
    return best


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    units = draw(st.integers(1, 9))
    stages = draw(st.integers(1, min(4, units)))
    seconds = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))
    transfer = st.one_of(seconds, st.just(math.inf))

    def table(values: st.SearchStrategy[float], rows: int, columns: int) -> np.ndarray:
        size = {"min_size": columns, "max_size": columns}
        return np.array([draw(st.lists(values, **size)) for _ in range(rows)]).reshape(rows, columns)

    steps = [draw(st.lists(st.integers(0, 2), min_size=units + 1, max_size=units + 1)) for _ in range(stages)]
    windows = np.minimum(np.cumsum(steps, axis=1) // 2, np.arange(units + 1))
    return Chain(table(seconds, stages, units), table(transfer, stages - 1, units + 1), windows)


@SETTINGS
@given(chains())
def test_no_cut_of_a_row_is_better(chain: Chain) -> None:
    found, best = cut(chain), best_by_trying(chain)
    if found is None:
        assert best == math.inf
        return
    assert found.slowest == max(chain.stage_seconds(found.cuts))
    assert found.slowest == pytest.approx(best, rel=1e-9)
    ends = (0, *found.cuts, chain.units)
    assert all(begin < end for begin, end in itertools.pairwise(ends))
    assert all(chain.earliest[stage, ends[stage + 1]] <= ends[stage] for stage in range(chain.stages))


def test_where_all_cuts_are_as_good_the_one_that_sends_least_is_taken() -> None:
    seconds = np.array([[1.0, 0.0, 0.0, 0.0, 1.0]] * 2)
    transfer = np.array([[0.5, 0.2, 0.1, 0.3, 0.2, 0.5]])
    found = cut(Chain(seconds, transfer, np.zeros((2, 6), np.int64)))
    assert found is not None
    assert found.cuts == (2,)


class Net(nn.Module):
    """A random network: each step adds up two earlier values, and applies one of two layers (so weights are tied)."""

    def __init__(self, recipe: list[tuple[int, int, int]]) -> None:
        super().__init__()
        torch.manual_seed(len(recipe))
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.recipe = recipe

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = [x]
        for one, two, layer in self.recipe:
            total = values[one % len(values)] + values[two % len(values)]
            values.append(self.layers[layer](total) if layer < 2 else total.relu())
        return values[-1], values[len(values) // 2]


RECIPES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 2)), min_size=2, max_size=4)
DEVICES = """
[[device]]
name = "slow"
tflops = { float32 = 1e-6 }
bandwidth_gb_s = 1e-3
memory_gb = MEMORY
link_gb_s = 1e-2
link_us = 1
[[device]]
name = "fast"
count = 2
tflops = { float32 = 3e-6 }
bandwidth_gb_s = 2e-3
memory_gb = MEMORY
link_gb_s = 2e-2
link_us = 1
"""


class Oracle:
    """An order of a graph, and of every cut what it costs, each found from the graph by definition."""

    def __init__(self, program: Program, each: Row, devices: tuple[Device, ...]) -> None:
        self.row, self.devices = each, devices
        context = optc.PassContext()
        times = {device: node_seconds(program, device, 1, context, True)[0] for device in set(devices)}
        self.seconds = [[sum(times[d].get(n.name, 0.0) for n in u.nodes) for u in each.units] for d in devices]
        self.made = [set(each.work.inputs), *(set(unit.nodes) for unit in each.units)]

    def alive(self, cut: int) -> int:
        """Bytes of what is made before a cut and read behind it or given out in the end."""
        before = set().union(*self.made[: cut + 1])
        behind = set().union(*self.made[cut + 1 :])
        outputs = self.row.work.outputs
        return sum(self.row.work.bytes(node) for node in before if node in outputs or behind & set(node.users))

    def memory(self, begin: int, end: int) -> int:
        """Bytes of a stage: its parameters, and the most that is alive while one of its units runs."""
        inside = set().union(*self.made[begin + 1 : end + 1])
        operands = {operand for node in inside for operand in node.all_input_nodes}
        weights = {str(node.target): node.meta["val"].nbytes for node in operands if node.op == "get_attr"}
        peak = max(
            self.alive(at) + sum(map(self.row.work.bytes, self.made[at + 1]))  # what it makes, beside all it may read
            for at in range(begin, end)
        )
        return sum(weights.values()) + peak

    def ends(self) -> Iterator[tuple[int, ...]]:
        """Every cut: where the first stage begins, and where each ends."""
        units = len(self.row.units)
        for cuts in itertools.combinations(range(1, units), len(self.devices) - 1):
            yield (0, *cuts, units)

    def memory_needed(self) -> int:
        """The largest stage of the cut in which that is smallest."""
        return min(max(self.memory(*each) for each in itertools.pairwise(ends)) for ends in self.ends())

    def slowest(self) -> float:
        """Seconds of the slowest stage of the best cut that keeps within every device's memory."""
        best = math.inf
        stages = len(self.devices)
        for ends in self.ends():
            taken = []
            for stage, (begin, end) in enumerate(itertools.pairwise(ends)):
                if self.memory(begin, end) > (self.devices[stage].memory or 0):
                    taken.append(math.inf)
                taken.append(sum(self.seconds[stage][begin:end]))
                taken[-1] += self.link(stage - 1, begin) if stage else 0.0
                taken[-1] += self.link(stage, end) if stage < stages - 1 else 0.0
            best = min(best, max(taken))
        return best

    def link(self, stage: int, cut: int) -> float:
        one, two = self.devices[stage : stage + 2]
        bandwidth = min(one.link_bandwidth, two.link_bandwidth)
        return max(one.link_latency, two.link_latency) + self.alive(cut) / bandwidth


@settings(max_examples=25, deadline=None, derandomize=True)
@given(RECIPES, st.sampled_from(["just enough", "a byte too little", "plenty"]))
def test_no_cut_of_a_graph_is_better(recipe: list[tuple[int, int, int]], memory: str) -> None:
    program = optc.capture(Net(recipe).eval(), (torch.randn(2, 6),))
    work = Work(program, 1)
    rows = [row(work, units) for units in (work.units, few_alive(work))]
    needed = min(Oracle(program, each, parse("3xh100")).memory_needed() for each in rows)
    given = {"just enough": needed, "a byte too little": needed - 1, "plenty": 10**6}[memory]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "devices.toml")
        path.write_text(DEVICES.replace("MEMORY", f"{given / 1e9:.9f}"))
        devices = parse(str(path))
        assert [device.memory for device in devices] == [given] * 3
        find = Partition(devices=str(path))
        if given < needed:
            with pytest.raises(optc.OptcError, match="too large for its device"):
                find(program)
            return
        result = find(program)
    best = min(Oracle(program, each, devices).slowest() for each in rows)
    account = result.account
    slowest = max(each["receive_seconds"] + each["compute_seconds"] + each["send_seconds"] for each in account)
    assert slowest == pytest.approx(best, rel=1e-9)
    for entry, stage in zip(account, split(result.program), strict=True):  # what really is in the stages
        assert entry["weight_bytes"] == stage.program.constant_bytes()
        if entry["stage"] < 2:
            assert [each["name"] for each in entry["cut"]] == [wire.name for wire in stage.sends]
            assert entry["send_bytes"] == sum(wire.bytes(1) for wire in stage.sends)
    inputs = torch.randn(3, 6)
    for got, want in zip(run_stages(split(result.program), inputs), program.run(inputs), strict=True):
        torch.testing.assert_close(got, want)
