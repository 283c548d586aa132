"""The Program: a captured model as a ``torch.fx`` graph, with what is known about it and what was done to it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from torch.utils._pytree import TreeSpec

    from optc.passmanager.contract import PassRecord


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model input.

    Attributes:
        input_size: (channels, height, width) of one sample.
        mean, std: per-channel normalisation of values in [0, 1].
        interpolation: ``"bilinear"``, ``"bicubic"``, ``"lanczos"`` or ``"nearest"``.
        resize: length in pixels the image's shorter side is resized to before the centre crop to ``input_size``.
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    resize: int = 256


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from.

    Attributes:
        name: the name it was asked for by, or the class name of the module.
        source: ``"torchvision"``, ``"timm"``, ``"factory"``, ``"pt2"`` or ``"module"``.
        weights: ``"pretrained"``, ``"random"``, ``"given"`` (a module passed in), or the checkpoint's file name.
        weights_detail: tag, seed or SHA-256 that pins the weights down.
        notes: lines the user must see (such as a fallback to random weights).
    """

    name: str = "model"
    source: str = "module"
    weights: str = "given"
    weights_detail: str = ""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    notes: tuple[str, ...] = ()


@dataclass
class Program:
    """What passes transform.

    Attributes:
        module: flat ``fx.GraphModule`` (tensors in, tuple of tensors out) of functional ATen (and ``optc::``)
            operators. Parameters and constants are ``get_attr`` nodes; every tensor-valued node has a FakeTensor in
            ``node.meta["val"]``.
            Its shape is that of the example inputs; ``node.meta["dims"]``, where known, says which sizes vary
            (``("s0", 3, 64, 64)``; ``"8*s0"`` where the batch is multiplied), for rewrites that must hold at any batch.
        example_inputs: one tensor per placeholder, batch first (batch size 2 where the batch is dynamic, as
            ``torch.export`` specialises sizes 0 and 1).
        dynamic_batch: whether dimension 0 of every input may vary.
        info: where the model came from.
        output_spec: how the flat outputs nest in what the original module returned; ``None`` means as they are.
        history: one record per leaf pass applied, in order.
    """

    module: fx.GraphModule
    example_inputs: tuple[Tensor, ...]
    dynamic_batch: bool = True
    info: ModelInfo = field(default_factory=ModelInfo)
    output_spec: TreeSpec | None = None
    history: tuple[PassRecord, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        """The module's graph, which passes edit."""
        return self.module.graph

    def fork(self) -> Program:
        """Copy the graph, share the tensors: cheap in memory, linear in nodes.

        A pass works on a fork, so the program before it stays intact for comparison and roll-back. Constants that no
        node refers to are left behind.
        """
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, values)
        graph.output(output).meta = copy.copy(self.graph.output_node().meta)
        for old, new in values.items():
            new.meta = copy.copy(old.meta)
        return replace(self, module=graph_module(self.module, graph))

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """Each (dotted name, tensor) a ``get_attr`` node refers to, once, in graph order."""
        seen: set[str] = set()
        for node in self.graph.find_nodes(op="get_attr"):
            name = str(node.target)
            if name not in seen:
                seen.add(name)
                value = get_constant(self.module, name)
                if isinstance(value, Tensor):
                    yield name, value

    def operator_count(self) -> int:
        """Number of ``call_function`` nodes."""
        return sum(node.op == "call_function" for node in self.graph.nodes)

    def constant_bytes(self) -> int:
        """Bytes held by all constants; shared storages counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in self.constants()}
        return sum(storages.values())

    def fingerprint(self, *, contents: bool = False) -> str:
        """Hash of the graph's structure, its stages and its constants: of their identity, or of their bytes.

        Args:
            contents: read the constants' bytes, so that the same model has the same hash in another process; takes a
                second per 2 GB. Without, the hash is linear in nodes and holds within one process.
        """
        index = {node: i for i, node in enumerate(self.graph.nodes)}

        def position(node: fx.Node) -> Any:
            return _Ref(index[node])

        def encode(value: Any) -> str:
            return str(fx.map_arg(value, position))

        digest = hashlib.sha256()
        for node in self.graph.nodes:
            digest.update(f"{node.op} {_name(node.target)} {encode(node.args)} {encode(node.kwargs)}".encode())
            if "stage" in node.meta:
                digest.update(f"stage {node.meta['stage']}".encode())
            if node.op == "get_attr":
                value = get_constant(self.module, str(node.target))
                if isinstance(value, Tensor):
                    identity = "" if contents else (value.data_ptr(), value.is_conj(), value.is_neg())
                    digest.update(f"{identity} {value.dtype} {tuple(value.shape)} {value.stride()}".encode())
                    if contents:
                        plain = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
                        digest.update(plain.view(-1).view(torch.uint8).numpy().data)
                elif isinstance(value, fx.GraphModule):  # a branch of a condition
                    inner = replace(self, module=value).fingerprint(contents=contents)
                    digest.update(inner.encode())
        return digest.hexdigest()

    def text(self) -> str:
        """The graph as text: one node a line with its shape and dtype at the example inputs."""
        lines = []
        for node in self.graph.nodes:
            value = node.meta.get("val")
            kind = (
                f"  # {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if hasattr(value, "dtype") else ""
            )
            lines.append(f"{node.format_node() or ''}{kind}")
        return "\n".join(lines)

    @torch.no_grad()
    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the graph in eager PyTorch and return its outputs as a flat tuple."""
        outputs: tuple[Tensor, ...] = self.module(*inputs)
        return outputs

    def call(self, *inputs: Tensor) -> Any:
        """Run the graph and return its outputs nested as the original module nests them."""
        return self.nested(self.run(*inputs))

    def nested(self, outputs: Sequence[Tensor]) -> Any:
        """Flat outputs, nested as the original module returned them."""
        if self.output_spec is None:
            return tuple(outputs)
        return pytree.tree_unflatten(outputs, self.output_spec)


@dataclass(frozen=True)
class _Ref:
    """Stands for a node inside :meth:`Program.fingerprint`, by position rather than by name."""

    index: int

    def __repr__(self) -> str:
        return f"%{self.index}"


def _name(target: object) -> str:
    """A node's target as text that is the same in every process: a function's holds an address."""
    return f"{target.__module__}.{target.__qualname__}" if isinstance(target, FunctionType) else str(target)


def get_constant(module: torch.nn.Module, name: str) -> Any:
    """The attribute behind a ``get_attr`` node's dotted target."""
    value: Any = module
    for atom in name.split("."):
        value = getattr(value, atom)
    return value


def version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; of one made in inference mode nobody counts."""
    return None if tensor.is_inference() else tensor._version


def graph_module(root: torch.nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A GraphModule over ``graph`` that shares ``root``'s tensors and owns only those the graph refers to."""
    names = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    module = fx.GraphModule({name: get_constant(root, name) for name in names}, graph, class_name="Program")
    return module.eval()


def complete_meta(program: Program) -> None:
    """Give every node that lacks one a FakeTensor ``meta["val"]``, computed from its inputs' at the example shapes.

    Shapes are plain integers: the batch dimension reads as the example inputs' (2 where the batch is dynamic).
    """
    mode = next(
        (node.meta["val"].fake_mode for node in program.graph.nodes if isinstance(node.meta.get("val"), FakeTensor)),
        None,
    ) or FakeTensorMode(allow_non_fake_inputs=True)
    examples = iter(program.example_inputs)
    for node in program.graph.nodes:
        example = next(examples) if node.op == "placeholder" else None
        if "val" in node.meta or node.op == "output":
            continue
        if example is not None:
            node.meta["val"] = mode.from_tensor(example)
        elif node.op == "get_attr":
            value = get_constant(program.module, str(node.target))
            node.meta["val"] = mode.from_tensor(value) if isinstance(value, Tensor) else value
        else:
            with mode, torch.no_grad():
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
