"""What several tests of staged programs share: programs cut by hand, without the pass that cuts them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from optc.program import Program


class Residual(nn.Module):
    """Two branches that are added, one of them over several layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(self.norm(x))


@pytest.fixture(scope="session")
def cut() -> Callable[[Program, int], Program]:
    """Share a program's operators out to so many stages, equally many each, as the pass ``partition`` marks them."""

    def cut_program(program: Program, stages: int) -> Program:
        forked = program.fork()
        nodes = [node for node in forked.graph.nodes if node.op == "call_function"]
        for index, node in enumerate(nodes):
            node.meta["stage"] = index * stages // len(nodes)
        return forked

    return cut_program


@pytest.fixture
def residual_model() -> nn.Module:
    """(batch, 8) to (batch, 4), with residuals."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), Residual(16), Residual(16), Residual(16), nn.Linear(16, 4)).eval()
