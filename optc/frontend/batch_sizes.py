"""Whether a captured graph computes what the model does, also for other batch sizes than that of the examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from optc.errors import CaptureError
from optc.program import Program, version
from optc.rewrite import is_random
from optc.sqnr import decides, sqnr_db

aten = torch.ops.aten

_TRIED = (*range(2, 66), 100, 127, 128, 255, 256, 1000)
OWN_BATCHES = 32
"""What optc itself puts together, as for calibration and Offline."""
_SAME_SIZE = re.compile(r"L\S+\.size\(\)\[0\] == L\S+\.size\(\)\[0\]")
_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze_.default, aten.squeeze_.dim)
CONDITIONS = "optc.conditions"
"""Under this name a module's ``meta`` holds what a file says about the sizes that its graph takes."""
_LEAST_DB = {torch.float16: 30.0, torch.bfloat16: 25.0}
_LEAST_DB_OTHERWISE = 60.0
"""SQNR of a capture: it runs the model's own operators, so that rounding alone may differ."""


def refuse_other_paths(graph: fx.Graph) -> None:
    """Where the model's code asks for the batch size, the graph holds only the path that the example batch took.

    The exporter writes down what it took for granted, as conditions of sizes and strides. That 0 and 1 may be special
    it leaves out: see :func:`compare_with_model`.

    Args:
        graph: as exported just now, with a batch that varies.

    Raises:
        CaptureError: some batch size from 2 on does not meet them.
    """
    for node in graph.nodes:
        if node.target in _SQUEEZES and any(map(_varies, _squeezed(node))):
            raise CaptureError(
                "squeeze() drops the batch dimension of a single sample; name the dimension: squeeze(-1)"
            )
    sizes = _batches(graph)
    # As they were when a condition was written down, and as equal sizes became one.
    symbols = {symbol for size in sizes for symbol in (size.node._expr, size.node.expr)}
    for guard in sizes[0].node.shape_env.guards if sizes else ():
        about_batches = symbols.issuperset(guard.expr.free_symbols)
        if about_batches and not all(_holds(guard.expr, batch) for batch in _TRIED):
            condition = re.sub(r"\bs\d+\b", "batch", str(guard.expr))
            raise CaptureError(f"its code goes another way unless {condition}")


def limits(graph: fx.Graph) -> tuple[int, int | None]:
    """The least and the most samples that a graph loaded from a file takes at a time, ``None`` without a bound."""
    found = [size.node.shape_env.var_to_range.get(size.node.expr) for size in _batches(graph)]
    known = [each for each in found if each is not None]
    upper = min((each.upper for each in known), default=None)
    bounded = upper is not None and upper < 2**31
    return max((int(each.lower) for each in known), default=0), int(upper) if bounded and upper is not None else None


def takes_one_batch(module: torch.nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether a module is known to take its example inputs' batch only, as of an exported graph, or none at all."""
    if len({len(tensor) for tensor in inputs}) > 1:
        return True
    if not isinstance(module, fx.GraphModule):
        return False
    values = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    return any(isinstance(value, Tensor) and value.ndim > 0 and not _varies(value.shape[0]) for value in values)


def refuse_limits(graph: fx.Graph, conditions: Sequence[str]) -> None:
    """As :func:`refuse_other_paths`, for a graph from a file.

    Args:
        conditions: in words; they are not evaluated, as they might be anything.

    Raises:
        CaptureError: it takes fewer samples than optc puts together, or a condition is about a batch size, and not only
            that two inputs have the same.
    """
    least, most = limits(graph)
    if least > 2 or (most is not None and most < OWN_BATCHES):
        raise CaptureError(f"it was exported for batches from {least} to {most or 'any'}")
    for condition in conditions:
        if ".size()[0]" in condition and not _SAME_SIZE.fullmatch(condition):
            raise CaptureError(f"it was exported for batches with {condition[:100]}")


def model_outputs(model: torch.nn.Module, inputs: Sequence[Tensor]) -> list[Any]:
    """What the model returns, flat. Neither the inputs nor the model's buffers are changed.

    Attention is computed as it is exported: PyTorch's other way writes zeros for tokens that are masked out.
    """
    buffers = [(buffer, buffer.clone(), version(buffer)) for buffer in model.buffers()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return pytree.tree_leaves(model(*(tensor.clone() for tensor in inputs)))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for buffer, before, seen in buffers:
            if version(buffer) != seen:
                buffer.copy_(before)


def compare_with_model(wanted: Sequence[Any], program: Program, inputs: Sequence[Tensor], what: str) -> None:
    """Hold the graph to what the model itself computes.

    Random operators draw other numbers in each call; then only the outputs' shapes are compared.

    Args:
        wanted: what the model returned. It has to be run before it is exported: what it keeps of an export, as in a
            cache of its own, are no real tensors.
        what: what the inputs are, for errors.

    Raises:
        CaptureError: an output differs.
    """
    got = program.run(*(tensor.clone() for tensor in inputs))
    random = any(map(is_random, program.graph.nodes))
    for number, (model_output, output) in enumerate(zip(wanted, got, strict=True)):
        if model_output.shape != output.shape:
            was, now = tuple(model_output.shape), tuple(output.shape)
            raise CaptureError(f"output {number} of the model is {was} {what}, of the graph {now}")
        if not random and not _same(model_output, output):
            raise CaptureError(f"output {number} of the graph differs {what} from what the model computes")


def _batches(graph: fx.Graph) -> list[Any]:
    """The sizes of the inputs' first dimensions that vary."""
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    return [
        value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim > 0 and _varies(value.shape[0])
    ]


def _varies(size: object) -> bool:
    return isinstance(size, torch.SymInt)


def _squeezed(node: fx.Node) -> list[object]:
    """The sizes that a squeeze drops where they are 1."""
    source: Any = node.args[0]
    sizes = list(source.meta["val"].shape)
    asked: Any = node.args[1] if len(node.args) > 1 else range(len(sizes))
    return [sizes[dim] for dim in ([asked] if isinstance(asked, int) else asked)]


def _holds(condition: Any, batch: int) -> bool:
    """Whether a condition of sympy's is met where every size in it is the batch."""
    return bool(condition.subs(dict.fromkeys(condition.free_symbols, batch)))


def _same(wanted: Tensor, got: Tensor) -> bool:
    if decides(wanted.dtype):
        return torch.equal(wanted, got)
    least = _LEAST_DB.get(wanted.dtype, _LEAST_DB_OTHERWISE)
    if wanted.is_complex():
        wanted, got = torch.view_as_real(wanted.resolve_conj()), torch.view_as_real(got.resolve_conj())
    if wanted.dtype.is_floating_point and wanted.dtype.itemsize == 1:
        wanted, got = wanted.float(), got.float()
    known = wanted.isfinite()
    signal = wanted[known].double()
    noise = float((got[known].double() - signal).square().sum())
    return noise == 0.0 or sqnr_db(float(signal.square().sum()), noise) >= least
