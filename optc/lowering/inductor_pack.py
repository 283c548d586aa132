"""Lays out weights for the target's batch where the batch may vary: Inductor then knows none to lay them out for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._inductor import freezing

from optc.lowering.replaced import replaced


@contextmanager
def packed_for(batch: int) -> Iterator[None]:
    """Have Inductor pack the weights of oneDNN's kernels for queries of ``batch`` samples.

    With a dynamic batch it packs weights of int8 layers for a shape of its own choice and those of convolutions not at
    all; the kernel of the actual shape then rearranges them at every call. Batches of other sizes run as before: what
    is laid out for one is rearranged for another.
    """
    module: Any = freezing
    passes = module.freezing_passes

    def and_pack(graph: fx.GraphModule, inputs: Any) -> None:
        passes(graph, inputs)
        _pack(graph, batch)
        graph.recompile()

    with replaced(module, "freezing_passes", and_pack):
        yield


def _pack(module: fx.GraphModule, batch: int) -> None:
    for node in list(module.graph.nodes):
        operator = _operator(node)
        if operator in ("onednn::qconv_prepack", "onednn::qlinear_prepack"):
            *args, shape = node.args
            layer = next(iter(node.users), None)
            if shape is None and layer is not None:
                node.args = (*args, _shape(layer.args[0], batch))
        elif operator == "mkldnn::_convolution_pointwise":
            source, weight, _, *how = node.args[:7]
            if isinstance(weight, fx.Node) and weight.op == "get_attr":
                with module.graph.inserting_before(node):
                    reorder = torch.ops.mkldnn._reorder_convolution_weight.default
                    packed = module.graph.call_function(reorder, (weight, *how, _shape(source, batch)))
                node.replace_input_with(weight, packed)


def _operator(node: fx.Node) -> str:
    """The name of a node's operator, which this PyTorch may not have: on some CPUs it comes without oneDNN."""
    name: str = getattr(node.target, "_qualified_op_name", "") or getattr(
        getattr(node.target, "_schema", None), "name", ""
    )
    return name


def _shape(value: fx.Node, batch: int) -> list[int]:
    """A value's shape at this batch, the only symbol in it."""
    return [
        size if isinstance(size, int) else int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, batch)))
        for size in value.meta["val"].shape
    ]
