"""The exporter's decomposition of the graph, left out where there is nothing to decompose."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx
from torch._ops import OpOverload
from torch.export import ExportedProgram

from optc.lowering.replaced import replaced


@contextmanager
def decomposed_where_needed() -> Iterator[None]:
    """Exports in this context decompose a program only if an operator of it has no translation of its own.

    torch.onnx has every program traced anew for that, and first looks at each operator of PyTorch (torch 2.11 to 2.13):
    for one layer it takes as long as all the rest, and there is no option to leave it out. A torch that decomposes
    elsewhere does so as it always does.
    """
    try:
        from torch.onnx._internal.exporter import _fx_passes
    except ImportError:
        yield
        return
    original = getattr(_fx_passes, "decompose_with_registry", None)
    if original is None:
        yield
        return

    def decompose_with_registry(exported_program: ExportedProgram, registry: Any) -> ExportedProgram:
        if all(_is_translated(node, registry) for node in exported_program.graph.nodes):
            return exported_program
        decomposed: ExportedProgram = original(exported_program, registry)
        return decomposed

    with replaced(_fx_passes, "decompose_with_registry", decompose_with_registry):
        yield


def _is_translated(node: fx.Node, registry: Any) -> bool:
    """Whether the exporter takes a node as it is: an input or output, or a functional operator that it knows."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        return False
    return node.target is operator.getitem or bool(registry.is_registered(node.target))
