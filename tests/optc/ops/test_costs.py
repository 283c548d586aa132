from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import optc
from optc import PassContext
from optc.ops.costs import CostGraph, NodeCost, node_costs
from optc.passmanager.manager import build_passes


def costs_of(model: nn.Module, shape: tuple[int, ...], passes: str = "", batch: int = 1) -> CostGraph:
    inputs = (torch.randn(2, *shape),)
    program = optc.capture(model.eval(), inputs)
    if passes:
        program = build_passes(passes)(program, PassContext(calibration=Batches([inputs] * 4))).program
    return CostGraph(node_costs(program, batch))


class Batches(list[tuple[torch.Tensor, ...]]):
    description = "random"


def of(costs: CostGraph, operator: str) -> list[NodeCost]:
    return [cost for cost in costs.values() if operator in cost.operator]


def test_a_convolution_counts_its_multiplications_and_additions() -> None:
    costs = costs_of(nn.Conv2d(3, 8, 3, padding=1, bias=False), (3, 10, 10))
    (conv,) = of(costs, "conv2d")
    assert conv.operations == 2 * 8 * 3 * 3 * 3 * 10 * 10
    assert conv.constant_bytes == 8 * 3 * 3 * 3 * 4
    assert sum(conv.reads.values()) == 3 * 10 * 10 * 4
    assert conv.writes == 8 * 10 * 10 * 4
    assert conv.result


def test_groups_divide_the_operations() -> None:
    (conv,) = of(costs_of(nn.Conv2d(8, 8, 3, groups=8, bias=False), (8, 10, 10)), "conv2d")
    assert conv.operations == 2 * 8 * 3 * 3 * 8 * 8


def test_a_batch_scales_operations_and_values_but_not_weights() -> None:
    one, four = (of(costs_of(nn.Linear(16, 32), (16,), batch=batch), "linear")[0] for batch in (1, 4))
    assert one.operations == 2 * 16 * 32
    assert four.operations == 4 * one.operations
    assert four.writes == 4 * one.writes
    assert four.constant_bytes == one.constant_bytes == (16 * 32 + 32) * 4


def test_attention_on_the_cpu_counts_both_products() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    (attention,) = of(costs_of(Attention(), (2, 5, 8)), "scaled_dot_product_attention")
    assert attention.operations == 2 * (2 * 2 * 5 * 5 * 8)


def test_a_composite_counts_as_the_layer_in_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 4), nn.ReLU())
    plain, fused = costs_of(model, (3, 10, 10)), costs_of(model, (3, 10, 10), "fuse")
    for layer, composite in (("aten.conv2d", "optc.conv2d_relu"), ("aten.linear", "optc.linear_relu")):
        assert of(fused, composite)[0].operations == of(plain, layer)[0].operations
    assert of(fused, "optc.conv2d_relu")[0].module == "0"


def test_quantized_values_count_as_the_integers_they_are_stored_as() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False))
    costs = costs_of(model, (3, 10, 10), "fuse,quant")
    (first,) = of(costs, "conv2d_relu")
    assert sum(first.reads.values()) == 3 * 10 * 10
    assert first.writes == 8 * 8 * 8
    scales = 8 * (4 + 1)  # a float32 scale and an int8 zero point for each output channel
    assert first.constant_bytes == 8 * 3 * 3 * 3 + scales


def test_what_a_kernel_hands_on_to_itself_is_no_traffic() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Sigmoid(), nn.Conv2d(8, 4, 1, bias=False))
    costs = costs_of(model, (3, 10, 10))
    first, sigmoid, _ = costs
    operations, constants, moved = costs.traffic({first, sigmoid})
    assert operations == costs[first].operations + costs[sigmoid].operations
    assert constants == 8 * 3 * 4
    assert moved == (3 + 8) * 100 * 4
    assert costs.traffic(set(costs))[2] == (3 + 4) * 100 * 4


VIEWS = {
    "view": lambda x: x.view(-1, 12),
    "permute": lambda x: x.permute(0, 2, 1),
    "_unsafe_view": lambda x: torch.ops.aten._unsafe_view(x, [x.shape[0], 12]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_cost_nothing(name: str) -> None:
    class Viewing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(VIEWS[name](x))

    costs = costs_of(Viewing(), (3, 4))
    assert [cost.operator for cost in costs.values()] == ["aten.relu.default"]
    assert sum(next(iter(costs.values())).reads.values()) == 3 * 4 * 4


def test_each_part_of_a_value_counts_but_none_twice() -> None:
    """As attention reads queries, keys and values that one product computed."""

    class Parts(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = (x + 1).chunk(2, dim=1)
            return torch.stack([torch.cat([a, b], 1), torch.cat([a, a[:, 1:], b], 1)[:, :8]]).mean(0)

    costs = costs_of(Parts(), (8,))
    first, second = of(costs, "cat")
    assert dict(first.reads) == dict(second.reads) == {"add": 8 * 4}
    half = NodeCost("a", "relu", "", 4.0, 0, {"x": 16}, 16, result=True)
    source = NodeCost("x", "linear", "", 1.0, 0, {}, 32)
    readers = [half, replace(half, node="b"), replace(half, node="c")]
    assert [CostGraph([source, *readers]).traffic(nodes)[2] for nodes in ("a", "ab", "abc")] == [32, 64, 80]


def test_an_operator_of_several_results_counts_by_its_first() -> None:
    (norm,) = costs_of(nn.BatchNorm2d(8), (8, 10, 10)).values()
    assert "batch_norm" in norm.operator
    assert norm.operations == norm.writes / 4 == 8 * 10 * 10
    assert norm.constant_bytes == 4 * 8 * 4
    assert norm.result


def test_a_constant_repeated_for_each_sample_is_read_once() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)

    (joined,) = costs_of(Token(), (3, 8), batch=4).values()
    assert joined.constant_bytes == 8 * 4
    assert sum(joined.reads.values()) == 4 * 3 * 8 * 4
    assert joined.operations == 0


class FirstImage(nn.Module):
    """A layer whose values do not vary with the batch, between a view that takes one image and one that repeats it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x[0]).relu().expand(len(x), -1, -1, -1)


@pytest.mark.parametrize("passes", ["", "fuse"])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_what_does_not_vary_with_the_batch_is_not_scaled(passes: str, batch: int) -> None:
    conv = next(iter(costs_of(FirstImage(), (4, 8, 8), passes, batch).values()))
    assert conv.operations == 2 * 4 * 9 * 6 * 6 * 6
    assert (list(conv.reads.values()), conv.writes) == ([4 * 8 * 8 * 4], 6 * 6 * 6 * 4)
    assert conv.constant_bytes == 6 * 4 * 9 * 4


def test_what_adds_up_a_batch_is_scaled_with_it() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum(0)

    (total,) = costs_of(Sum(), (8,), batch=4).values()
    assert (total.operations, sum(total.reads.values()), total.writes) == (4 * 8, 4 * 8 * 4, 8 * 4)


LOOKUPS = {
    "embedding": lambda table, x: nn.functional.embedding(x, table),
    "index": lambda table, x: table[x],
    "index_select": lambda table, x: table.index_select(0, x.flatten()),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_of_a_table_counts_what_is_looked_up(name: str) -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(1000, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return LOOKUPS[name](self.table, x)

    program = optc.capture(Lookup(), (torch.zeros(2, 5, dtype=torch.int64),))
    for batch, read in ((1, 5), (4, 20), (1000, 1000)):
        (lookup,) = node_costs(program, batch)
        assert lookup.constant_bytes == read * 16 * 4
        assert lookup.writes == batch * 5 * 16 * 4
        assert sum(lookup.reads.values()) == batch * 5 * 8


def test_of_a_constant_counts_the_part_that_is_read() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(1, 100, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.positions[:, :3]

    (added,) = costs_of(Positions(), (3, 8), batch=4).values()
    assert added.constant_bytes == 3 * 8 * 4
