"""Whoever is given an output may write into it: no rewrite makes it an input's, a constant's or another's memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optc_passes.constants import FoldConstants
from optc_passes.fuse import Fuse
from optc_passes.identity import RemoveIdentity
from optc_passes.subexpressions import MergeCommonSubexpressions
from optc_passes.views import MergeViews

X = torch.randn(2, 3, 4)


class Model(nn.Module):
    """``compute(module, x)`` with a table at hand."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.table, self.compute = nn.Parameter(torch.randn(2, 3)), compute

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.compute(self, x)


COPIES: dict[str, Callable[[nn.Module, Tensor], tuple[Tensor, ...]]] = {
    "a view of an input's copy": lambda m, x: (x.clone().flatten(1),),
    "a reshape of an input's copy": lambda m, x: (x.clone().reshape(-1, 2, 6).transpose(1, 2),),
    "a slice of an input and nothing": lambda m, x: ((x + 0)[:, 1],),
    "a transposed input times one": lambda m, x: ((x * 1).transpose(1, 2),),
    "a copy of an input's view": lambda m, x: (x.transpose(1, 2).clone().transpose(1, 2),),
    "a view of a constant's copy": lambda m, x: (x + 1, m.table.clone()[None]),
    "a flat constant's copy": lambda m, x: (x + 1, m.table.clone().view(6)),
    "a value and its copy": lambda m, x: ((y := x.relu()), y.clone()),
    "a value and two copies": lambda m, x: (x.relu().clone(), (y := x.relu()).clone(), y + 0),
    "views of a value and of its copy": lambda m, x: ((y := x.relu()).flatten(1), y.clone().transpose(1, 2)),
    "a value computed twice": lambda m, x: (x.relu(), x.relu()),
    "an expanded value's copy": lambda m, x: (x.mean(1, keepdim=True).expand(-1, 3, -1).clone(),),
    "overlapping windows' copy": lambda m, x: (x.relu().unfold(2, 2, 1).clone(),),
    "views of a value computed twice": lambda m, x: (x.relu().flatten(1), x.relu()[:, 0]),
}


@pytest.mark.parametrize("case", COPIES)
def test_outputs_keep_memory_of_their_own(tester: Callable, case: str) -> None:
    t = tester(Model(COPIES[case]), X).run(Fuse()).check_close()
    x = X.double()
    owners = [x, *(constant for _, constant in t.program.constants()), *t.program.run(x)]
    for tensor in owners:
        places = torch.arange(tensor.untyped_storage().nbytes()).as_strided(tensor.shape, tensor.stride())
        assert places.unique().numel() == tensor.numel(), "each element has a place of its own"
    memory = [tensor.untyped_storage().data_ptr() for tensor in owners]
    assert len(set(memory)) == len(memory)
    assert t.skipped


@pytest.mark.parametrize(
    ("pass_", "case", "reason"),
    [
        (RemoveIdentity, "a view of an input's copy", "an output would be the same tensor as x"),
        (RemoveIdentity, "a flat constant's copy", "an output would be the same tensor as table"),
        (RemoveIdentity, "a value and its copy", "two outputs would be the same tensor"),
        (MergeCommonSubexpressions, "a value computed twice", "two outputs would be the same tensor"),
        (FoldConstants, "a flat constant's copy", "an output would be the same tensor as a constant"),
    ],
)
def test_says_why_it_stays(tester: Callable, pass_: type, case: str, reason: str) -> None:
    t = tester(Model(COPIES[case]), X).run(pass_()).check_untouched()
    assert {skip.reason for skip in t.skipped} == {reason}


def test_a_copy_behind_a_view_that_is_returned_stays(tester: Callable) -> None:
    tester(Model(COPIES["a view of an input's copy"]), X).run(MergeViews()).check_count(clone=1)


def test_copies_that_own_no_output_alone_go(tester: Callable) -> None:
    """One of the equal values is only read here, and the copy of a computed value is the only one returned."""
    t = tester(Model(lambda m, x: (x.relu().clone().flatten(1), x.relu().exp())), X).run(Fuse()).check_close()
    t.check_count(relu=1, clone=0)
    assert not t.skipped


def test_equal_views_of_an_input_become_one(tester: Callable) -> None:
    """An output is a view of the input either way, as the model has it."""
    t = tester(Model(lambda m, x: (x.flatten(1), x.flatten(1).exp())), X).run(MergeCommonSubexpressions())
    assert t.check_applied("merge-common-subexpressions", 1).check_close().skipped == ()
