"""Which nodes of a program each of Inductor's kernels computes: what Inductor says, in the program's names."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

OPTIONS = {"cpp.enable_kernel_profile": True, "trace.provenance_tracking_level": 2}
"""Options of Inductor: each kernel opens a range for PyTorch's profiler, and tells what it was made from."""

_ARTIFACT = "inductor_provenance_tracking_node_mappings"
_HANDLE = re.compile(r"(.+):(\d+)")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class _Listener(logging.Handler):
    """Keeps the last mapping that Inductor logs."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.mapping: dict[str, Any] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "metadata", {}).get("artifact", {}).get("name") == _ARTIFACT:
            self.mapping = json.loads(getattr(record, "payload", "") or "{}")


@contextmanager
def provenance() -> Iterator[dict[str, Any]]:
    """What Inductor logs of its kernels while the context lasts; there when it ends, empty if it says nothing.

    It is the structured log that the variable ``TORCH_TRACE`` writes to files.
    """
    found: dict[str, Any] = {}
    log, listener = logging.getLogger("torch.__trace"), _Listener()
    level, propagate = log.level, log.propagate
    log.addHandler(listener)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield found
    finally:
        log.removeHandler(listener)
        log.setLevel(level)
        log.propagate = propagate
        found.update(listener.mapping)


def kernels(
    mapping: Mapping[str, Any], program: fx.Graph, given: fx.Graph, layers: Sequence[str]
) -> list[dict[str, Any]]:
    """Inductor's kernels in the order that they run in: ``name`` of the range, ``kind`` and ``nodes`` as KernelTime's.

    Args:
        mapping: what :func:`provenance` found.
        program: the graph as it was exported; parts of composites know their composite (``meta["part_of"]``).
        given: the exported graph that Inductor got, whose nodes know those of ``program``.
        layers: the program's convolutions and linear layers, composites by their own name, in order.
    """
    exported = {node.name: _root(node) for node in given.nodes}
    before: Mapping[str, Sequence[str]] = mapping.get("postToPre", {})
    parts = {node.name: node for node in program.nodes if node.op == "call_function"}
    made: dict[str, list[str]] = {}
    for kernel, sources in mapping.get("cppCodeToPost", {}).items():
        names = [exported.get(name, name) for source in sources for name in before.get(source, ())]
        made[kernel] = [name for name in dict.fromkeys(names) if name in parts]
    _claim_the_rest(made, program)
    _place_layers(made, parts.values(), layers)
    _claim_the_rest(made, program)
    found = []
    for kernel in sorted(made, key=_handle):
        match = _HANDLE.fullmatch(kernel)
        name = match[1] if match else kernel
        whole = dict.fromkeys(str(parts[part].meta.get("part_of", part)) for part in made[kernel])
        kind = _kind(name, [parts[part] for part in made[kernel]])
        found.append({"name": name, "kind": kind, "nodes": list(whole)})
    return found


def _place_layers(made: dict[str, list[str]], parts: Iterable[fx.Node], layers: Sequence[str]) -> None:
    """Layers without a kernel go to the library calls without a node, if they are as many.

    The last layer of a model is one: Inductor says that it was made from the order of strides of the output.
    """
    of_layer = {str(node.meta.get("part_of", node.name)): node.name for node in parts}
    placed = {name for names in made.values() for name in names}
    missing = [of_layer[layer] for layer in layers if layer in of_layer and of_layer[layer] not in placed]
    empty = [kernel for kernel in sorted(made, key=_handle) if not made[kernel] and not kernel.startswith("cpp_")]
    if len(missing) == len(empty):
        for kernel, name in zip(empty, missing, strict=True):
            made[kernel].append(name)


def _claim_the_rest(made: dict[str, list[str]], program: fx.Graph) -> None:
    """Nodes that no kernel is said to compute, as a convolution with a fused ReLU, go with those that read them."""
    by_node: dict[str, set[str]] = {}
    for kernel, names in made.items():
        for name in names:
            by_node.setdefault(name, set()).add(kernel)
    for node in reversed(list(program.nodes)):
        if node.op == "call_function" and not by_node.get(node.name):
            readers = set().union(*(by_node.get(user.name, set()) for user in node.users))
            by_node[node.name] = readers
            for kernel in readers:
                made[kernel].append(node.name)


def _root(node: fx.Node) -> str:
    """The name a node had before it was exported."""
    sources = list(node.meta.get("from_node") or ())
    while sources and sources[0].from_node:
        sources = list(sources[0].from_node)
    return str(sources[0].name) if sources else node.name


def _handle(kernel: str) -> int:
    match = _HANDLE.fullmatch(kernel)
    return int(match[2]) if match else 0


def _kind(name: str, nodes: Sequence[fx.Node]) -> str:
    """What a kernel computes in: an integer kernel of oneDNN says so, others compute in the type of what they give."""
    if "qconv" in name or "qlinear" in name:
        return "int8"
    values = [node.meta.get("val") for node in nodes]
    types = [value.dtype for value in values if isinstance(value, Tensor) and value.dtype in _FLOATS]
    return str(types[0]).removeprefix("torch.") if types else ""
