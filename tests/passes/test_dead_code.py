"""remove-dead-code: what no output depends on goes, what one does stays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from optc_passes.dead_code import RemoveDeadCode


class Dead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, never_read: Tensor) -> Tensor:
        self.unused(x).relu()
        return self.used(x)


def test_removes_chains_and_their_constants_but_no_input(tester: Callable) -> None:
    t = tester(Dead(), torch.randn(2, 4), torch.randn(2, 3))
    with t.program.graph.inserting_before(t.program.graph.output_node()):
        (linear,) = t.program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        t.program.graph.call_function(torch.ops.aten.relu.default, (linear,))
    t.run(RemoveDeadCode()).check_count(linear=1, relu=0).check_close()
    assert [node.name for node in t.program.graph.find_nodes(op="placeholder")] == ["x", "never_read"]
    assert sorted(name for name, _ in t.program.constants()) == ["used.bias", "used.weight"]


def test_leaves_live_code(tester: Callable) -> None:
    tester(nn.Linear(4, 4), torch.randn(2, 4)).run(RemoveDeadCode()).check_untouched()
