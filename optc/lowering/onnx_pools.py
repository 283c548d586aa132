"""Average pools that divide by a number of their own, which torch.onnx would pass over."""

from __future__ import annotations

import math

import torch

from optc.errors import BackendError
from optc.program import Program
from optc.rewrite import argument, calls, module_path, set_argument

aten = torch.ops.aten
_RANKS = {aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}


def fit_divisors(program: Program) -> None:
    """Write each average pool with a ``divisor_override``, in place, as one without, times a number.

    A product has the name of its pool in ``meta["part_of"]``.

    Raises:
        BackendError: windows of a pool may be cut off at the edge, where this is not the same.
    """
    for node in calls(program, *_RANKS):
        divisor = argument(node, "divisor_override")
        if divisor is None:
            continue
        if argument(node, "ceil_mode"):
            where = f" in module {module_path(node)!r}" if module_path(node) else ""
            raise BackendError(
                f"operator {node.target} (node '{node.name}'{where}) has no ONNX form: divisor_override with ceil_mode",
                "choose a backend that runs it, such as --backend eager",
            )
        kernel = list(argument(node, "kernel_size"))
        area = math.prod(kernel * (_RANKS[node.target] // len(kernel)))  # type: ignore[index]
        set_argument(node, "count_include_pad", True)
        set_argument(node, "divisor_override", None)
        with node.graph.inserting_after(node):
            scaled = node.graph.call_function(aten.mul.Tensor)
        node.replace_all_uses_with(scaled)
        scaled.args = (node, area / divisor)
        scaled.meta["part_of"] = node.meta.get("part_of", node.name)
    program.module.recompile()
