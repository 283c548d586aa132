"""fold-layer-scale: constants that multiply channels go into the layer beside them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optc_passes.layer_scale import FoldLayerScale

TOKENS = torch.randn(2, 6, 8)
IMAGE = torch.randn(2, 4, 5, 5)


class Scaled(nn.Module):
    """``compute(module, x)`` with layers and factors at hand."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(4, 8, 2, groups=2)
        self.gamma = nn.Parameter(torch.ones(8))
        self.pixel_gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.table = nn.Parameter(torch.rand(6, 8) + 0.5)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


FOLDED = {
    "linear": (Scaled(lambda m, x: x + m.linear(x) * m.gamma), TOKENS),
    "factor first": (Scaled(lambda m, x: m.gamma * m.linear(x)), TOKENS),
    "number": (Scaled(lambda m, x: m.linear(x) * 0.125), TOKENS),
    "convolution": (Scaled(lambda m, x: m.conv(x) * m.pixel_gamma), IMAGE),
    "transposed convolution": (Scaled(lambda m, x: m.up(x) * m.pixel_gamma), IMAGE),
    "across permute": (Scaled(lambda m, x: m.linear(x).permute(0, 2, 1) * m.pixel_gamma[:, 0]), TOKENS),
    "zero pad after": (Scaled(lambda m, x: m.linear(nn.functional.pad(x.relu() * m.gamma, (0, 0, 1, 2)))), TOKENS),
    "before the layer": (Scaled(lambda m, x: m.linear(x.relu() * m.gamma)), TOKENS),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folds(tester: Callable, case: str) -> None:
    from optc_passes.constants import FoldConstants

    model, x = FOLDED[case]
    t = tester(model, x).run(FoldConstants(), FoldLayerScale())
    t.check_count(mul=0).check_applied("fold-layer-scale", 1).check_close()


class Shared(Scaled):
    def __init__(self) -> None:
        super().__init__(lambda m, x: (y := m.linear(x)) * m.gamma + y)


BLOCKED = {
    "shared output": (Shared(), TOKENS, "linear (linear) before it is also used by add"),
    "table": (Scaled(lambda m, x: m.linear(x) * m.table), TOKENS, "its factor varies along 2 dimensions"),
    "activation between": (
        Scaled(lambda m, x: m.linear(x).relu() * m.gamma),
        TOKENS,
        "relu before it is neither a convolution nor a linear layer, and after it the output is neither",
    ),
    "pad with ones after": (
        Scaled(lambda m, x: m.linear(nn.functional.pad(x.relu() * m.gamma, (0, 0, 1, 2), value=1.0))),
        TOKENS,
        "pad after it pads with a constant",
    ),
    "other dimension": (
        Scaled(lambda m, x: m.linear(x.transpose(1, 2)[:, :, :1].expand(-1, -1, 8)) * m.pixel_gamma[:, 0]),
        TOKENS,
        "dimension 1 is not the channels of linear",
    ),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_says_why_not(tester: Callable, case: str) -> None:
    from optc_passes.constants import FoldConstants

    model, x, reason = BLOCKED[case]
    t = tester(model, x).run(FoldConstants())
    t.before, t.applied, t.modified = t.program, (), False
    t.run(FoldLayerScale()).check_untouched().check_skipped("fold-layer-scale", reason)


@pytest.mark.parametrize(
    "compute",
    [
        lambda m, x: m.linear(x) * x,
        lambda m, x: m.linear(x)[:, :1] * m.table,
        lambda m, x: m.linear(x) + (m.table * x.shape[0]).sum(),
    ],
)
def test_products_of_computed_values_and_broadcasts_are_no_candidates(tester: Callable, compute: Callable) -> None:
    assert not tester(Scaled(compute), TOKENS).run(FoldLayerScale()).check_untouched().skipped


@pytest.mark.parametrize(
    "compute", [lambda m, x: x / (x.abs().mean() * 2.0 + 1), lambda m, x: x * (m.one.exp() * m.one)]
)
def test_a_single_number_has_no_channels(tester: Callable, compute: Callable) -> None:
    model = Scaled(compute)
    model.one = nn.Parameter(torch.tensor(0.5))
    assert not tester(model, TOKENS).run(FoldLayerScale()).check_untouched().check_close().skipped
