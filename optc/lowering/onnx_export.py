"""Program to ONNX file: decompose, export through torch.onnx, tidy, write; without a second copy of the weights."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import onnx
import onnx_ir as ir
import torch
from torch import fx
from torch.export import Dim, ExportedProgram

from optc.errors import BackendError, first_line
from optc.lowering import onnx_blocks, onnx_dynamic, onnx_rewrites
from optc.lowering.onnx_attention import fit_attention
from optc.lowering.onnx_decompose import decomposed_where_needed
from optc.lowering.onnx_pools import fit_divisors
from optc.lowering.onnx_registry import registry_kept
from optc.ops import COMPOSITES, decompose, global_pools_as_means
from optc.program import Program

OPSET, LEAST_OPSET = 23, 21
"""The first opset with an Attention operator, which onnxruntime runs as one kernel; and the first with 4-bit weights
and scales for blocks of them."""
EXTERNAL_DATA_BYTES = 512 << 20
"""Weights beyond this go to a file of their own. Protobuf's limit is 2 GiB, but a single file is built and parsed in
memory, which costs the size of the weights twice over."""

log = logging.getLogger(__name__)
_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


def export_onnx(
    program: Program,
    path: Path,
    opset: int = OPSET,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    check: Callable[[Path], None] = lambda file: None,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Write ``program`` as ONNX: inputs named as its placeholders, outputs ``output`` or ``output_0``, ``output_1``, …

    Dimension 0 of every input is called ``batch`` where the program's batch is dynamic. Explicit quantize and
    dequantize operators become QuantizeLinear and DequantizeLinear; quantized weights stay integers. Weights are read
    from the program's tensors one by one while the file is written. What is refused leaves ``path`` as it was.

    Args:
        path: the ``.onnx`` file to write.
        opset: version of the ONNX operator set, at least :data:`LEAST_OPSET`.
        external_data_bytes: weights beyond this many bytes are written beside it as ``<path>.data``.
        check: called with the file before it gets its name; what it raises refuses it.

    Returns:
        Names of the files written, and what is worth knowing of them: opset, operator counts, decomposed composites,
        and in ``"origins"`` by the name of each node and value of the file that of the program's node it was made from.

    Raises:
        BackendError: an operator has no ONNX form (names node, operator, module and reason), the batch cannot stay
            dynamic, or onnx.checker refuses the file.
    """
    with _quiet(), registry_kept(), decomposed_where_needed():
        model, plain = _translated(program, opset)
        size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
        data = f"{path.name}.data" if size > external_data_bytes else None
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            draft = Path(folder, path.name)
            ir.save(model, draft, external_data=data)
            _check_file(draft)
            check(draft)
            for name in filter(None, (data, path.name)):
                os.replace(draft.with_name(name), path.with_name(name))
    details = {
        "opset": opset,
        "weight_bytes": size,
        "operators": dict(Counter(node.op_type for node in model.graph).most_common()),
        "origins": dict(_origins(model, plain)),
        "decomposed": dict(Counter(str(n.target) for n in program.graph.nodes if n.target in COMPOSITES)),
    }
    return (path.name, data) if data else (path.name,), details


_known: WeakKeyDictionary[fx.GraphModule, tuple[tuple[Any, ...], ir.Model, Program]] = WeakKeyDictionary()
"""The last translation of each program that is still used: several backends start from the same file."""


def _translated(program: Program, opset: int) -> tuple[ir.Model, Program]:
    """The program as an ONNX model, tidied, and what it was translated from: the program without composites."""
    state = _state(program, opset)
    found = _known.get(program.module)
    if found is None or found[0] != state:
        plain = decompose(program)
        global_pools_as_means(plain)
        fit_divisors(plain)
        fit_attention(plain)
        model = _translate(plain, opset)
        onnx_rewrites.tidy(model)
        found = _known[program.module] = state, model, plain
    return found[1], found[2]


def _state(program: Program, opset: int) -> tuple[Any, ...]:
    """What a translation depends on: the graph, and the tensors in the state they are in."""
    tensors = sorted((name, id(value), value._version) for name, value in program.constants())
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in program.example_inputs)
    return opset, program.dynamic_batch, shapes, str(program.graph), tuple(tensors)


def _translate(program: Program, opset: int) -> ir.Model:
    """The program as an onnx_ir model whose initializers are views of the program's tensors."""
    exported = _reexport(program)
    count = len(exported.graph_signature.user_outputs)
    names = ["output"] if count == 1 else [f"output_{index}" for index in range(count)]
    shapes = tuple({0: "batch"} for _ in program.example_inputs) if program.dynamic_batch else None
    try:
        translated = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            output_names=names,
            optimize=False,
            custom_translation_table=onnx_blocks.TRANSLATIONS | onnx_dynamic.TRANSLATIONS,
            verbose=False,
        )
    except Exception as error:
        if isinstance(error, OSError):
            raise
        raise _untranslatable(exported, error) from error
    assert translated is not None
    return translated.model


def _reexport(program: Program) -> ExportedProgram:
    """The program as an ExportedProgram, which is what torch.onnx takes; shares the tensors."""
    batch = Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in program.example_inputs) if program.dynamic_batch else None
    try:
        with torch.no_grad():
            return torch.export.export(program.module, program.example_inputs, dynamic_shapes=shapes)
    except Exception as error:
        raise BackendError(
            f"the optimized graph of {program.info.name} cannot be exported for ONNX: {first_line(error)}",
            "run with -v for the traceback",
        ) from error


def _untranslatable(exported: ExportedProgram, error: Exception) -> BackendError:
    """Name the node torch.onnx stopped at: its message quotes the node, the cause underneath has the reason."""
    cause: BaseException = error
    text = str(error)
    while cause.__cause__ is not None:
        cause = cause.__cause__
        text += f"\n{cause}"
    quoted = re.search(r"%(\w+) : .*?target=([\w.]+)\]", text)
    if quoted is None:
        return BackendError(f"the model has no ONNX form: {first_line(cause)}", "run with -v for the traceback")
    name, target = quoted.groups()
    node = _origin(exported, name, target)
    reason = first_line(cause).partition(", or ")[0]
    if node is None:
        what = f"operator {target.removeprefix('torch.ops.')} (node '{name}')"
    else:
        path = _module_path(node)
        what = f"operator {node.target} (node '{node.name}'{f' in module {path!r}' if path else ''})"
    return BackendError(f"{what} has no ONNX form: {reason}", "choose a backend that runs it, such as --backend eager")


def _origin(exported: ExportedProgram, name: str, target: str) -> fx.Node | None:
    """The node torch.onnx means, or the one it was decomposed from; ``None`` if it cannot be traced back."""
    nodes: dict[str, fx.Node] = {node.name: node for node in exported.graph.nodes}
    if name in nodes and _qualified(nodes[name]) == target:
        return nodes[name]
    try:
        decomposed = exported.run_decompositions(dict(torch._decomp.decomposition_table))
    except Exception as error:
        log.debug("cannot trace %s back: %s", target, error)
        return None
    for node in decomposed.graph.nodes:
        if _qualified(node) == target:
            sources = list(node.meta.get("from_node") or ())
            while sources:
                source = sources.pop(0)
                if source.name in nodes:
                    return nodes[source.name]
                sources += source.from_node
    return None


def _origins(model: ir.Model, plain: Program) -> Iterator[tuple[str, str]]:
    """(name of a node or its value in the file, name in the program) of what the exporter made of ``plain``'s nodes."""
    parts = {node.name: str(node.meta.get("part_of", node.name)) for node in plain.graph.nodes}
    for node in model.graph:
        exported = node.meta.get("node")
        sources = list(exported.meta.get("from_node") or ()) if isinstance(exported, fx.Node) else []
        # Nodes know what they were before each time they were traced; the program itself may have been traced, too.
        while sources and sources[0].graph_id != id(plain.graph) and sources[0].from_node:
            sources = list(sources[0].from_node)
        if sources and sources[0].name in parts:
            names = (node.name, *(value.name for value in node.outputs))
            yield from ((name, parts[sources[0].name]) for name in names if name)


def _qualified(node: fx.Node) -> str:
    return f"torch.ops.{node.target}" if isinstance(node.target, torch._ops.OpOverload) else str(node.target)


def _module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module of the original model that ``node`` came from."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((path for path, _ in reversed(list(stack.values())) if path), "")


def _check_file(path: Path) -> None:
    """Let onnx.checker look at the file itself: from a path it also checks external data, and takes more than 2 GiB."""
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"onnx.checker refuses {path.name}: {first_line(error)}") from error


class _ToDebug(logging.Handler):
    """Passes other packages' messages on at DEBUG."""

    def emit(self, record: logging.LogRecord) -> None:
        log.debug("%s: %s", record.name, record.getMessage())


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn warnings and log messages of the exporter's packages into debug messages of ours."""
    handler = _ToDebug()
    loggers = [logging.getLogger(name) for name in _CHATTY]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        for warning in caught:
            log.debug("%s: %s", warning.category.__name__, warning.message)
