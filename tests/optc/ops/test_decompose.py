"""decompose: composites back into ATen, computing the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import optc
from optc.ops import COMPOSITES, Composite, decompose
from optc.program import Program

OPERATORS = {row.name: operator for operator, row in COMPOSITES.items()}


class OneComposite(nn.Module):
    def __init__(self, row: Composite) -> None:
        super().__init__()
        self.row = row
        self.layer = nn.Conv2d(4, 4, 3, padding=1) if row.is_conv else nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        other = (x.exp(),) if self.row.residual else ()
        geometry = ([1, 1], [1, 1]) if self.row.is_conv else ()
        return OPERATORS[self.row.name](x, self.layer.weight, self.layer.bias, *other, *geometry)


def targets(program: Program) -> list[object]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("row", COMPOSITES.values(), ids=lambda row: row.name)
def test_replaces_every_composite(row: Composite) -> None:
    x = torch.randn(2, 4, 5, 5) if row.is_conv else torch.randn(2, 4)
    program = optc.capture(OneComposite(row), (x,))
    plain = decompose(program)
    plain.graph.lint()
    assert OPERATORS[row.name] in targets(program)
    assert targets(plain)[-1 - row.residual - (row.activation is not None) :][0] is row.base
    assert not any(target in COMPOSITES for target in targets(plain))
    assert all(isinstance(n.meta["val"], FakeTensor) for n in plain.graph.nodes if n.op == "call_function")
    for batch in (1, 3):
        x = torch.randn(batch, *x.shape[1:])
        torch.testing.assert_close(plain.run(x), program.run(x))


def test_leaves_the_program_it_is_given_alone_and_shares_its_weights() -> None:
    program = optc.capture(OneComposite(COMPOSITES[OPERATORS["linear_add"]]), (torch.randn(2, 4),))
    fingerprint = program.fingerprint()
    plain = decompose(program)
    assert program.fingerprint() == fingerprint
    assert {t.data_ptr() for _, t in plain.constants()} == {t.data_ptr() for _, t in program.constants()}
    assert decompose(plain).fingerprint() == plain.fingerprint()
