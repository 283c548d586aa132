"""fold-layer-norm: γ and β go into the linear layers that read the norm, and into nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from optc_passes.layer_norm import FoldLayerNorm

TOKENS = torch.randn(2, 6, 8)


class Reads(nn.Module):
    """A layer norm and what reads it."""

    def __init__(
        self, read: Callable[[nn.Module, Tensor], Tensor], *, bias: bool = True, norm_bias: bool = True
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8, bias=norm_bias)
        self.a, self.b = nn.Linear(8, 5, bias=bias), nn.Linear(8, 5, bias=bias)
        self.pixel = nn.Conv2d(8, 4, 1)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self, self.norm(x))


FOLDED = {
    "linear": Reads(lambda m, y: m.a(y)),
    "no biases": Reads(lambda m, y: m.a(y), bias=False),
    "several linears": Reads(lambda m, y: m.a(y) * m.b(y)),
    "selected token": Reads(lambda m, y: m.a(y[:, 0])),
    "windows": Reads(lambda m, y: m.a(y.view(-1, 2, 3, 8).permute(0, 2, 1, 3).reshape(-1, 6, 8))),
    "rolled": Reads(lambda m, y: m.a(torch.roll(y, 2, 1))),
    "mean of tokens": Reads(lambda m, y: m.a(y.mean(1))),
    "pixels": Reads(lambda m, y: m.pixel(y.view(-1, 2, 3, 8).permute(0, 3, 1, 2))),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folds(tester: Callable, case: str) -> None:
    t = tester(FOLDED[case], TOKENS).run(FoldLayerNorm()).check_applied("fold-layer-norm", 1).check_close()
    (norm,) = t.program.graph.find_nodes(op="call_function", target=torch.ops.aten.layer_norm.default)
    assert norm.args[2:4] == (None, None)


def test_pad_is_crossed_where_the_norm_does_not_shift(tester: Callable) -> None:
    model = Reads(lambda m, y: m.a(functional.pad(y, (0, 0, 1, 2))), norm_bias=False)
    model.norm.bias = None
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
    tester(model, TOKENS, randomized=False).run(FoldLayerNorm()).check_applied("fold-layer-norm", 1).check_close()


class ComputedScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.layer_norm(x, (8,), weight=x.mean((0, 1))))


class TwoDimensions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm((6, 8)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class ComputedWeight(Reads):
    def __init__(self) -> None:
        super().__init__(lambda m, y: functional.linear(y, m.a.weight * y.mean()))


BLOCKED = {
    "residual": (Reads(lambda m, y: m.a(y) + y[..., :5]), "slice_1 is neither a convolution nor a linear layer"),
    "activation": (Reads(lambda m, y: m.a(y.relu())), "relu is neither a convolution nor a linear layer"),
    "output": (Reads(lambda m, y: y), "the output is neither"),
    "zero pad": (Reads(lambda m, y: m.a(functional.pad(y, (0, 0, 1, 2)))), "pad after it pads with a constant"),
    "padding convolution": (
        Reads(lambda m, y: functional.conv2d(y.view(-1, 2, 3, 8).permute(0, 3, 1, 2), m.pixel.weight, padding=1)),
        "conv2d after it pads with zeros",
    ),
    "two dimensions": (TwoDimensions(), "it normalises over several dimensions"),
    "computed scale": (ComputedScale(), "its weight is not a constant"),
    "computed weight": (ComputedWeight(), "mean is neither"),
    "split channels": (
        Reads(lambda m, y: m.a(y.view(-1, 6, 2, 4).transpose(2, 3).reshape(-1, 6, 8))),
        "view is neither",
    ),
    "transposed": (
        Reads(lambda m, y: functional.linear(y.transpose(1, 2), m.pixel.weight.view(4, 8)[:, :6])),
        "dimension 1 is not the channels linear after it works on",
    ),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_says_why_not(tester: Callable, case: str) -> None:
    model, reason = BLOCKED[case]
    tester(model, TOKENS).run(FoldLayerNorm()).check_untouched().check_skipped("fold-layer-norm", reason)


def test_norm_without_affine_is_no_candidate(tester: Callable) -> None:
    model = nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 5))
    assert not tester(model, TOKENS).run(FoldLayerNorm()).check_untouched().skipped
