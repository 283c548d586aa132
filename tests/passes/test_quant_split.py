"""Composites an int8 kernel covers stay whole; the others are split where the rounding goes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import optc
from optc.ops import COMPOSITES
from optc_passes.quant_split import split_composites


class Composite(nn.Module):
    """A composite operator between two convolutions."""

    def __init__(self, name: str) -> None:
        super().__init__()
        (self.operator, self.row) = next((op, row) for op, row in COMPOSITES.items() if row.name == name)
        self.first = nn.Conv2d(3, 8, 3)
        self.inner: nn.Module = nn.Conv2d(8, 8, 1) if self.row.is_conv else nn.Linear(10, 10)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        other = (y,) if self.row.residual else ()
        return self.last(self.operator(y, self.inner.weight, self.inner.bias, *other))


IMAGE = torch.randn(2, 3, 12, 12)
SPLIT = sorted(
    row.name for row in COMPOSITES.values() if row.is_conv and row.name not in ("conv2d_relu", "conv2d_relu6")
)
WHOLE = sorted({row.name for row in COMPOSITES.values()} - set(SPLIT))


@pytest.mark.parametrize("name", [row.name for row in COMPOSITES.values()])
def test_int8_composites_keep_the_numbers(quantized: Callable, name: str) -> None:
    q = quantized(Composite(name), IMAGE)
    assert len(q.result.applied) == 3
    assert not q.result.skipped
    assert (name in q.chain()) == (name in WHOLE)
    assert q.sqnr_db > 20


@pytest.mark.parametrize("name", ["conv2d_add_relu", "conv2d_add"])
def test_both_operands_of_a_residual_are_int8(quantized: Callable, name: str) -> None:
    assert "q d d conv2d q d add" in quantized(Composite(name), IMAGE).chain()


def test_the_rounding_stands_between_convolution_and_float_activation(quantized: Callable) -> None:
    assert "q d conv2d q d silu q d conv2d q d" in quantized(Composite("conv2d_silu"), IMAGE).chain()


@pytest.mark.parametrize("name", SPLIT)
def test_splitting_is_exact(name: str) -> None:
    program = optc.capture(Composite(name), (IMAGE,))
    split = split_composites(program.fork())
    split.module.recompile()
    torch.testing.assert_close(split.run(IMAGE), program.run(IMAGE), rtol=1e-5, atol=1e-6)
    assert not any(node.target in COMPOSITES for node in split.graph.nodes)


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_else_is_split(name: str) -> None:
    program = optc.capture(Composite(name), (IMAGE,))
    assert split_composites(program.fork()).fingerprint() == program.fingerprint()
