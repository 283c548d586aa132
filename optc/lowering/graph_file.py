"""Programs as files: ``graph.json`` for the operators, ``weights.safetensors`` for the constants.

Not ``torch.export.save``: its loader unpickles (``torch.load(weights_only=False)``) whatever the archive asks it to,
and evaluates shape expressions as Python. Here a file can name only operators registered with PyTorch and a few
functions on numbers; constants are plain bytes; nothing runs before the model is called. Writing needs no second
export and shares the program's weights.
"""

from __future__ import annotations

import importlib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from optc.errors import BackendError
from optc.lowering.inputs import described
from optc.program import Program, complete_meta, graph_module
from optc.rewrite import label

GRAPH, WEIGHTS = "graph.json", "weights.safetensors"
VERSION = 2

_NUMBER_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (
            operator,
            [
                "getitem",
                "add",
                "sub",
                "mul",
                "floordiv",
                "truediv",
                "mod",
                "pow",
                "neg",
                "pos",
                "eq",
                "ne",
                "lt",
                "le",
                "gt",
                "ge",
                "and_",
                "or_",
                "not_",
            ],
        ),
        (math, ["ceil", "floor", "trunc", "sqrt", "pow"]),
        (torch, ["sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sqrt", "sym_sum"]),
    )
    for name in names
}
"""The Python functions a graph may call, all on numbers (``getitem`` also on tuples)."""

_FUNCTION_NAMES = {function: name for name, function in _NUMBER_FUNCTIONS.items()}
_OPERATOR = re.compile(r"(\w+)\.(\w+)\.(\w+)")
_REGISTERED_BY = {
    "optc": "optc.ops",
    "quantized_decomposed": "torch.ao.quantization.fx._decomposed",
}
_REFUSED = {
    torch.ops.aten.from_file: "it reads a file",
    torch.ops.aten.as_strided: "it depends on the strides its input had when the model was captured",
}
_TYPES = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def refusal(node: fx.Node) -> str | None:
    """Why a node cannot be written, or ``None`` if it can."""
    if node.op not in ("placeholder", "get_attr", "call_function", "output"):
        return f"it is a {node.op}, not a call of an operator"
    if node.op != "call_function":
        return None
    if not isinstance(node.target, OpOverload) and node.target not in _FUNCTION_NAMES:
        return f"{getattr(node.target, '__name__', node.target)} is not a PyTorch operator"
    if isinstance(node.target, OpOverload) and (reason := _objection(node.target)):
        return reason
    try:
        _encode([node.args, *node.kwargs.values()], dict.fromkeys(node.all_input_nodes, 0))
    except TypeError as error:
        return str(error)
    return None


def refuse_unwritable(program: Program, what: str) -> None:
    """Refuse a program that cannot be written.

    Args:
        what: the beginning of the message, such as ``"the eager backend cannot write"``.

    Raises:
        BackendError: names the nodes, with reasons.
    """
    refused = [f"{label(node)}: {reason}" for node in program.graph.nodes if (reason := refusal(node))]
    if refused:
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise BackendError(f"{what} {'; '.join(refused[:3])}{more}", "use another backend")


def write_graph(program: Program, folder: Path) -> tuple[str, str]:
    """Write ``program`` into ``folder`` and return the names of its two files. Tied weights are written once."""
    index: dict[fx.Node, int] = {}
    names: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    constants, calls, channels_last = [], [], []
    found = dict(program.constants())
    inputs = program.graph.find_nodes(op="placeholder")
    attributes = program.graph.find_nodes(op="get_attr")
    for node in (*inputs, *attributes):
        index[node] = len(index)
    for node in attributes:
        tensor = found[str(node.target)].detach()
        signs = tensor.is_conj(), tensor.is_neg()
        key = (tensor.data_ptr() or node, signs, tensor.dtype, tensor.shape, tensor.stride())
        name = names.setdefault(key, str(node.target))
        if name not in tensors:
            if _is_channels_last(tensor):  # safetensors keeps no strides: written as the dense tensor it is in memory
                channels_last.append(name)
                tensor = tensor.permute(0, 2, 3, 1)
            tensors[name] = _alone(tensor.resolve_conj().resolve_neg())  # safetensors would write the bytes as they are
        constants.append(name)
    for node in program.graph.nodes:
        if node.op == "call_function":
            target = _FUNCTION_NAMES.get(node.target) or str(node.target)
            keywords = {key: _encode(value, index) for key, value in node.kwargs.items()}
            calls.append([node.name, target, _encode(node.args, index), keywords])
            index[node] = len(index)
    document = {
        "format": "optc graph",
        "version": VERSION,
        "inputs": described(program),
        "constants": constants,
        "channels_last": channels_last,
        "calls": calls,
        "outputs": _encode(program.graph.output_node().args[0], index),
    }
    (folder / GRAPH).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    (folder / WEIGHTS).chmod((folder / GRAPH).stat().st_mode)  # safetensors lets only the owner read what it writes
    return GRAPH, WEIGHTS


def read_graph(folder: Path, batch: int, device: str = "cpu") -> Program:
    """Read what :func:`write_graph` wrote as a program whose example inputs have ``batch`` rows where they may vary.

    Raises:
        BackendError: the files are no such graph, or call an operator that is not registered.
    """
    try:
        document = json.loads((folder / GRAPH).read_text(encoding="utf-8"))
        if document["format"] != "optc graph" or document["version"] > VERSION:
            raise BackendError(f"'{folder / GRAPH}' was written by a newer optc", "upgrade optc")
        if device == "cuda":  # which safetensors takes for the first GPU, PyTorch for the current one
            device = f"cuda:{torch.cuda.current_device()}"
        tensors = safetensors.torch.load_file(folder / WEIGHTS, device=device)
        for name in document.get("channels_last", ()):
            tensors[name] = tensors[name].permute(0, 3, 1, 2)
        program = _build(document, tensors, batch, device)
        complete_meta(program)
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise BackendError(f"cannot read the graph in '{folder}': {error}", "optimize the model again") from error
    return program


def _build(document: Mapping[str, Any], tensors: Mapping[str, Tensor], batch: int, device: str) -> Program:
    root, graph = torch.nn.Module(), fx.Graph()
    values: list[fx.Node] = []
    examples = []
    # Names are written into generated code: they are made here, or lose what could be code.
    for number, entry in enumerate(document["inputs"]):
        values.append(graph.placeholder(f"input_{number}"))
        shape = [batch if size is None else int(size) for size in entry["shape"]]
        examples.append(torch.zeros(shape, dtype=_named(entry["dtype"], torch.dtype), device=device))
    for number, name in enumerate(document["constants"]):
        root.register_buffer(f"constant_{number}", tensors[name])
        values.append(graph.get_attr(f"constant_{number}"))
    for name, target, args, kwargs in document["calls"]:
        function = _resolve(target)
        keywords = {key: _decode(item, values, device) for key, item in _keywords(function, kwargs).items()}
        arguments, plain = tuple(_decode(args, values, device)), re.sub(r"\W", "_", str(name), flags=re.ASCII)
        values.append(graph.create_node("call_function", function, arguments, keywords, name=plain))
    graph.output(tuple(_decode(document["outputs"], values, device)))
    dynamic = any(entry["shape"][:1] == [None] for entry in document["inputs"])
    return Program(graph_module(root, graph), tuple(examples), dynamic)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor stored densely and by itself, as safetensors asks; the same one where it is."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _encode(value: Any, index: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"value": index[value]}
    if isinstance(value, (list, tuple)):
        return [_encode(item, index) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, torch.device):
        return {"device": value.type}
    for kind, cls in _TYPES.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise TypeError(f"an argument is a {type(value).__name__}")


def _decode(value: Any, values: list[fx.Node], device: str) -> Any:
    if isinstance(value, list):
        return [_decode(item, values, device) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((kind, content),) = value.items()
        if kind == "value":
            return values[content]
        if kind == "float":
            return float(content)
        if kind == "device" and isinstance(content, str):
            return torch.device(device)
        if kind in _TYPES and isinstance(content, str):
            return _named(content, _TYPES[kind])
    raise ValueError(f"an argument is {value!r}")


def _keywords(function: Callable[..., Any], given: Any) -> dict[str, Any]:
    """Arguments by names that the operator has: no other may come into generated code."""
    keywords = dict(given)
    known = [argument.name for argument in function._schema.arguments] if isinstance(function, OpOverload) else []
    if unknown := [key for key in keywords if key not in known]:
        raise ValueError(f"{function} takes no argument {unknown[0]!r}")
    return keywords


def _named(name: str, cls: type) -> Any:
    value = getattr(torch, name, None)
    if not isinstance(value, cls):
        raise ValueError(f"{name!r} is not a {cls.__name__}")
    return value


def _resolve(target: str) -> Callable[..., Any]:
    if target in _NUMBER_FUNCTIONS:
        return _NUMBER_FUNCTIONS[target]
    match = _OPERATOR.fullmatch(target)
    if match is None:
        raise ValueError(f"{target!r} is not an operator")
    if match[1] in _REGISTERED_BY:
        importlib.import_module(_REGISTERED_BY[match[1]])
    function: Any = torch.ops
    for name in match.groups():
        function = getattr(function, name, None)
    if not isinstance(function, OpOverload):
        raise BackendError(f"the graph calls {target}, which is not registered", "import the package that provides it")
    if reason := _objection(function):
        raise BackendError(f"the graph calls {target}: {reason}", "optimize the model again")
    return function


def _objection(operator: OpOverload) -> str | None:
    """Why an operator has no place in a graph, whose values are tensors that nothing writes to."""
    if operator._schema.is_mutable:
        return "it writes to what it is given"
    return _REFUSED.get(operator.overloadpacket)
