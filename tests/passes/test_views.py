"""merge-views: chains of rearranging operators become one, and stay valid whatever the strides."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optc_passes.views import MergeViews

TOKENS = torch.randn(2, 6, 8)


class Between(nn.Module):
    """``compute`` between two operators that stay."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x.relu()).sigmoid()


CHAINS: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, int]]] = {
    "views": (lambda x: x.view(-1, 48).view(-1, 2, 24).view(-1, 4, 12), {"view": 1}),
    "there and back": (lambda x: x.view(-1, 48).view(-1, 6, 8), {"view": 0}),
    "permutes": (lambda x: x.view(-1, 2, 3, 8).permute(0, 2, 1, 3).transpose(1, 3), {"permute": 1, "transpose": 0}),
    "undone permute": (lambda x: x.permute(1, 2, 0).permute(2, 0, 1), {"permute": 0}),
    "undone transpose": (lambda x: x.transpose(1, 2).transpose(-1, -2), {"transpose": 0, "permute": 0}),
    "view of a copy": (
        lambda x: x.transpose(1, 2).contiguous().view(-1, 48),
        {"clone": 0, "view": 0, "reshape": 1},
    ),
    "view of a view of a copy": (
        lambda x: x.view(-1, 2, 3, 8).transpose(1, 2).contiguous().view(-1, 6, 8).view(-1, 48),
        {"clone": 0, "view": 1, "reshape": 1},
    ),
    "undone permute inside views": (
        lambda x: x.view(-1, 48).view(-1, 6, 8).transpose(1, 2).transpose(1, 2).reshape(-1, 48),
        {"view": 1, "transpose": 0, "permute": 0},
    ),
}


@pytest.mark.parametrize("case", CHAINS)
def test_merges(tester: Callable, case: str) -> None:
    compute, counts = CHAINS[case]
    tester(Between(compute), TOKENS).run(MergeViews()).check_count(**counts).check_close()


def test_view_after_a_reshape_that_may_not_copy_stays_valid(tester: Callable) -> None:
    """At batch 1 the reshape is a strided view, which no view could flatten further."""
    model = Between(lambda x: x.permute(2, 0, 1).contiguous().view(-1, 6).relu().view(-1))
    tester(model, TOKENS).run(MergeViews()).check_count(clone=0, view=0, reshape=2).check_close()


class Shared(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.relu().view(-1, 48)
        return flat.view(-1, 4, 12), flat


def test_a_view_others_use_stays(tester: Callable) -> None:
    tester(Shared(), TOKENS).run(MergeViews()).check_untouched()


class Input(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).transpose(1, 2)


def test_an_output_never_becomes_the_input_itself(tester: Callable) -> None:
    tester(Input(), TOKENS).run(MergeViews()).check_count(permute=1).check_close()


def test_mixed_chains_are_left(tester: Callable) -> None:
    tester(Between(lambda x: x.view(-1, 8, 6).transpose(1, 2)), TOKENS).run(MergeViews()).check_untouched()
