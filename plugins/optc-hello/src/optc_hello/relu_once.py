"""``relu(relu(x))`` is ``relu(x)``: the second one is dropped."""

from __future__ import annotations

import torch

from optc import Change, Pass, PassContext, PassResult, Program
from optc.rewrite import calls, is_call, replace

RELU = torch.ops.aten.relu.default


class ReluOnce(Pass):
    """Drop a ReLU whose input is already a ReLU's output. Exact: ReLU is idempotent."""

    name = "relu-once"
    summary = "Drop a ReLU whose input is already a ReLU's output."

    def run(self, program: Program, context: PassContext) -> PassResult:
        applied = []
        for node in calls(program, RELU):
            first = node.args[0]
            if isinstance(first, torch.fx.Node) and is_call(first, RELU):
                applied.append(Change("relu-once", node.name, f"same as {first.name}"))
                replace(node, first)
        return PassResult(program, modified=bool(applied), applied=tuple(applied))
