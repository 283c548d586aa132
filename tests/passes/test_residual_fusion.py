"""fuse-residual: adding a tensor to a layer's output becomes part of the layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optc_passes.residual_fusion import FuseResidual

IMAGE = torch.randn(2, 4, 7, 6)
TOKENS = torch.randn(2, 5, 8)


class Layers(nn.Module):
    """``compute(module, x)`` with layers at hand."""

    def __init__(self, compute: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.shortcut = nn.Conv2d(4, 4, 1, bias=False)
        self.conv_same = nn.Conv2d(4, 4, 3, padding="same")
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.linear, self.linear_2 = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.compute = compute

    def forward(self, x: Tensor) -> object:
        return self.compute(self, x)


FUSED = {
    "residual on the right": (lambda m, x: m.conv(x) + x, IMAGE, "conv2d_add"),
    "residual on the left": (lambda m, x: x + m.conv(x), IMAGE, "conv2d_add"),
    "added in place": (lambda m, x: m.conv(x).add_(x), IMAGE, "conv2d_add"),
    "linear": (lambda m, x: x + m.linear(x), TOKENS, "linear_add"),
    "linear without bias": (lambda m, x: x + m.linear_2(x), TOKENS, "linear_add"),
    "padding as a word": (lambda m, x: x + m.conv_same(x), IMAGE, "conv2d_add"),
    "residual computed after the layer": (lambda m, x: m.conv(x) + x.exp(), IMAGE, "conv2d_add"),
    "sum used twice": (lambda m, x: (y := m.conv(x) + x) * y.relu(), IMAGE, "conv2d_add"),
}


@pytest.mark.parametrize("case", FUSED)
def test_fuses(tester: Callable, case: str) -> None:
    compute, x, composite = FUSED[case]
    t = tester(Layers(compute), x).run(FuseResidual())
    t.check_count(**{composite: 1}, add=0, add_=0, conv2d=0, linear=0).check_applied("fuse-residual", 1).check_close()
    assert not t.skipped


def test_of_two_layers_fuses_the_later_and_says_so(tester: Callable) -> None:
    t = tester(Layers(lambda m, x: m.conv(x) + m.shortcut(x)), IMAGE).run(FuseResidual())
    t.check_count(conv2d_add=1, conv2d=1, add=0).check_applied("fuse-residual", 1).check_close()
    assert t.applied[0].detail.startswith("conv2d_1 (shortcut) + add")
    t.check_skipped("fuse-residual", "conv2d (conv) is the operand added in conv2d_add")


def test_of_two_layers_fuses_the_one_it_can(tester: Callable) -> None:
    def compute(m: nn.Module, x: Tensor) -> Tensor:
        first, second = m.conv(x), m.shortcut(x)
        return (second + first) * second

    t = tester(Layers(compute), IMAGE).run(FuseResidual()).check_count(conv2d_add=1, conv2d=1).check_close()
    assert t.applied[0].detail.startswith("conv2d (conv) + add")
    t.check_skipped("fuse-residual", "conv2d_1 (shortcut) is also used by mul")


def test_fuses_block_after_block(tester: Callable) -> None:
    def compute(m: nn.Module, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + m.linear(x)
        return x

    t = tester(Layers(compute), TOKENS).run(FuseResidual())
    t.check_count(linear_add=3, linear=0, add=0).check_applied("fuse-residual", 3).check_close()
    assert not t.skipped


def two_users(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    return (y + x) * y


BLOCKED = {
    "another user": (two_users, IMAGE, "conv2d (conv) is also used by mul"),
    "alpha": (lambda m, x: torch.add(m.conv(x), x, alpha=2), IMAGE, "it scales an operand by 2"),
    "alpha on the layer": (lambda m, x: torch.add(x, m.conv(x), alpha=0.5), IMAGE, "it scales an operand by 0.5"),
    "number": (lambda m, x: m.conv(x) + 1, IMAGE, "it adds a number, not a tensor"),
    "size": (lambda m, x: m.conv(x) + x.shape[0], IMAGE, "it adds a number, not a tensor"),
    "broadcast residual": (lambda m, x: m.conv(x) + x[:, :1], IMAGE, "it broadcasts [2, 1, 7, 6] and [2, 4, 7, 6]"),
    "broadcast layer": (lambda m, x: m.linear(x) + x[:, None], TOKENS, "it broadcasts [2, 1, 5, 8] and [2, 5, 8]"),
    "itself": (lambda m, x: (y := m.conv(x)) + y, IMAGE, "it adds conv2d (conv) to itself"),
    "another type": (lambda m, x: m.conv(x) + x.float(), IMAGE, "it adds torch.float32 to torch.float64"),
    "transposed": (lambda m, x: m.up(x) + x, IMAGE, "conv_transpose2d is a transposed convolution"),
}


@pytest.mark.parametrize("case", BLOCKED)
def test_says_why_not(tester: Callable, case: str) -> None:
    compute, x, reason = BLOCKED[case]
    tester(Layers(compute), x).run(FuseResidual()).check_untouched().check_skipped("fuse-residual", reason)


def test_a_second_addition_stays(tester: Callable) -> None:
    t = tester(Layers(lambda m, x: m.linear(x) + x + x.exp()), TOKENS).run(FuseResidual())
    t.check_count(linear_add=1, add=1).check_close()
    t.check_skipped("fuse-residual", "already holds an addition")


def test_leaves_other_sums_alone(tester: Callable) -> None:
    t = tester(Layers(lambda m, x: x.relu() + m.conv(x).exp()), IMAGE).run(FuseResidual()).check_untouched()
    assert not t.skipped
