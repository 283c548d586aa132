"""merge-common-subexpressions: equal work is done once; what only looks equal is not merged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optc_passes.subexpressions import MergeCommonSubexpressions

X = torch.randn(2, 8)


class Model(nn.Module):
    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.compute = nn.Linear(8, 8), nn.Linear(8, 8), compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def test_merges_equal_chains(tester: Callable) -> None:
    model = Model(lambda m, x: m.a(x).relu().view(-1, 2, 4) + m.a(x).relu().view(-1, 2, 4))
    t = tester(model, X).run(MergeCommonSubexpressions()).check_count(linear=1, relu=1, view=1).check_close()
    assert t.applied[0].detail == "same as linear"


def test_merges_tied_constants(tester: Callable) -> None:
    model = Model(lambda m, x: m.a(x) * m.b(x))
    model.b.weight, model.b.bias = model.a.weight, model.a.bias
    tester(model, X).run(MergeCommonSubexpressions()).check_count(linear=1).check_close()


def test_other_weights_arguments_and_types_differ(tester: Callable) -> None:
    for compute in (
        lambda m, x: m.a(x) * m.b(x),
        lambda m, x: x.sum(0) + x.sum(1, keepdim=True),
        lambda m, x: (x > 0) * 1 + (x > 0.5) * 1.0,
    ):
        tester(Model(compute), X).run(MergeCommonSubexpressions()).check_untouched()


def test_one_and_one_point_zero_are_different_arguments(tester: Callable) -> None:
    """An integer tensor times 1 stays integer; times 1.0 it does not."""

    class Integers(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            whole = x.argmax(1)
            return whole * 1, whole * 1.0

    tester(Integers(), X).run(MergeCommonSubexpressions()).check_untouched()


def test_random_values_differ(tester: Callable) -> None:
    model = Model(lambda m, x: x + torch.rand(8) + torch.rand(8))
    tester(model, X).run(MergeCommonSubexpressions()).check_untouched()


def test_a_constant_and_its_conjugate_differ(tester: Callable) -> None:
    class Conjugates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            factor = torch.randn(8, dtype=torch.complex128)
            self.register_buffer("factor", factor)
            self.register_buffer("conjugate", factor.conj())

        def forward(self, x: Tensor) -> Tensor:
            return torch.view_as_real(x * self.factor + 2 * x * self.conjugate)

    tester(Conjugates(), X).run(MergeCommonSubexpressions()).check_close()
