"""merge-parallel-linears: one matrix product for all linear layers over one input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optc_passes.activation_fusion import FuseActivation
from optc_passes.dead_code import RemoveDeadCode
from optc_passes.parallel_linears import MergeParallelLinears

TOKENS = torch.randn(2, 6, 8)


class Attention(nn.Module):
    def __init__(self, *, biases: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=bias) for bias in biases)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(-1, 6, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 6, 8))


def test_merges_query_key_value(tester: Callable) -> None:
    t = tester(Attention(), TOKENS).run(MergeParallelLinears())
    t.check_count(linear=2, split_with_sizes=1).check_applied("merge-parallel-linears", 1).check_close()
    assert t.applied[0].detail == "linear (q), linear_1 (k), linear_2 (v)"
    assert t.program.constant_bytes() == t.before.constant_bytes()


def test_layers_without_bias_get_zeros(tester: Callable) -> None:
    """As BEiT's attention, whose keys have no bias."""
    model = Attention(biases=(True, False, True))
    tester(model, TOKENS).run(MergeParallelLinears()).check_count(linear=2).check_close()


def test_no_bias_at_all_stays_none(tester: Callable) -> None:
    t = tester(Attention(biases=(False, False, False)), TOKENS).run(MergeParallelLinears()).check_close()
    merged = next(iter(t.program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)))
    assert merged.args[2] is None


class Different(nn.Module):
    """Outputs of several widths, flattened by views that a split's strides do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x).view(-1, 18).relu(), self.b(x).relu().view(-1, 30)


def test_views_of_the_parts_become_reshapes(tester: Callable) -> None:
    tester(Different(), TOKENS).run(MergeParallelLinears()).check_count(linear=1, view=0, reshape=2).check_close()


class OneComputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + functional.linear(x, self.b.weight * x.mean())


def test_computed_weight_is_left(tester: Callable) -> None:
    t = tester(OneComputed(), TOKENS).run(MergeParallelLinears()).check_untouched()
    t.check_skipped("merge-parallel-linears", "the weight of linear_1 is not a constant")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + functional.linear(x.relu(), self.a.weight)


def test_shared_weight_is_not_copied(tester: Callable) -> None:
    t = tester(Tied(), TOKENS).run(RemoveDeadCode())
    t.run(MergeParallelLinears()).check_untouched()
    t.check_skipped("merge-parallel-linears", "its weight is also used by linear_2")


def test_layers_over_different_inputs_are_no_candidates(tester: Callable) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert not tester(model, TOKENS).run(MergeParallelLinears()).check_untouched().skipped


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(self.gate(x)) * self.up(x)


def test_layer_with_its_activation_fused_is_left(tester: Callable) -> None:
    t = tester(Gated(), TOKENS).run(FuseActivation(), MergeParallelLinears()).check_count(linear_silu=1, linear=1)
    t.check_skipped("merge-parallel-linears", "it is fused with what follows it (linear_silu)")
    tester(Gated(), TOKENS).run(MergeParallelLinears()).check_count(linear=1, silu=1).check_close()


@pytest.mark.parametrize("shape", [(), (1,), (1, 8)], ids=str)
def test_a_bias_that_is_broadcast_is_left(tester: Callable, shape: tuple[int, ...]) -> None:
    """Beside two that can be merged."""
    model = Attention()
    model.q.bias = nn.Parameter(torch.randn(shape))
    t = tester(model, TOKENS).run(MergeParallelLinears()).check_count(split_with_sizes=1, linear=3).check_close()
    t.check_skipped("merge-parallel-linears", "the bias of linear is not one number per output channel")


def test_outputs_are_tensors_of_their_own(tester: Callable) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(8, 4) for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.a(x), self.b(x).flatten(1), self.c(x) + self.d(x)

    t = tester(Heads(), TOKENS).run(MergeParallelLinears()).check_count(linear=3).check_close()
    assert [skip.reason for skip in t.skipped] == 2 * ["an output would be a part of a larger tensor"]
    for output in t.program.run(TOKENS.double()):
        output.view(-1)
