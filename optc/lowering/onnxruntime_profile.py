"""What ONNX Runtime really ran: read from the profile of a query."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optc.errors import BackendError
from optc.lowering.layer_precision import layer_precision

_TYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "uint8": "int8",
    "int8": "int8",
}
BLOCK_KERNELS = ("MatMulNBits",)
"""Kernels that read blocks of small integers; how small, only the file tells."""
_DYNAMIC_KERNELS = ("DynamicQuantizeMatMul",)
"""Kernels that read floats and round them to 8 bits themselves."""
_INDEX_TYPES = frozenset(("int32", "int64", "bool"))
_NAMED = 8
"""How many nodes an error names."""

Tensor = tuple[str, tuple[int, ...]]
"""A type as ONNX Runtime spells it, and a shape."""


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that ONNX Runtime made of the file, as it ran.

    Attributes:
        node: its name there; fused nodes have that of one they were made of, with something before or after it.
        operator: such as ``"Conv"`` or ``"QLinearConv"``.
        provider: the execution provider that ran it.
        inputs, outputs: types and shapes. Weights that the kernel holds in a layout of its own are not among them.
        constant_bytes: size of the weights that are.
        weights: the type of a block kernel's weights, ``"int4"`` or ``"int8"``.
    """

    node: str
    operator: str
    provider: str
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    constant_bytes: int = 0
    weights: str = ""

    @property
    def kind(self) -> str:
        """What it multiplies in, which for most is the type it reads: ``"float32"``, ``"int8"``, …

        Empty for indices and the like.
        """
        if self.is_engine:
            return ""
        if self.operator in BLOCK_KERNELS:
            return self.weights or "int4"
        if self.operator in _DYNAMIC_KERNELS:
            return "int8"
        return _TYPES.get(self.inputs[0][0], "") if self.inputs else ""

    @property
    def is_layer(self) -> bool:
        """Whether it is a convolution or a matrix product with weights."""
        if "Conv" in self.operator or "Gemm" in self.operator or self.operator in BLOCK_KERNELS:
            return True
        if "MatMul" not in self.operator:
            return False
        matrices = [shape for _, shape in self.inputs if len(shape) > 1]
        return len(matrices) < 2 or self.constant_bytes >= math.prod(matrices[1])

    @property
    def is_engine(self) -> bool:
        """Whether it is a part of the graph that TensorRT compiled, which does not say what it runs."""
        return self.operator.startswith("TRTKernel")

    @property
    def is_bookkeeping(self) -> bool:
        """Whether it only copies between devices or computes shapes.

        ONNX Runtime computes shapes on the CPU whatever provider is asked for, because it needs them there.
        """
        if self.operator.startswith("Memcpy") or self.operator in ("Shape", "Size"):
            return True
        tensors = self.inputs + self.outputs
        return bool(tensors) and all(kind in _INDEX_TYPES and len(shape) <= 1 for kind, shape in tensors)


def kernels(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """The nodes that ran, in order and each once, from the events of ``InferenceSession.end_profiling``'s file."""
    found: dict[tuple[str, Any], Kernel] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") != "Node" or not name.endswith("_kernel_time"):
            continue
        args = event["args"]
        node = name.removesuffix("_kernel_time")
        found[node, args.get("node_index")] = Kernel(
            node,
            args["op_name"],
            args["provider"],
            _tensors(args["input_type_shape"]),
            _tensors(args["output_type_shape"]),
            int(args["parameter_size"]),
        )
    return list(found.values())


def plain_name(node: str) -> str:
    """A kernel's name without what ONNX Runtime's optimizers put around it: that of a node of the file."""
    name = node.removeprefix("fused ").removeprefix("InsertedPrecisionFreeCast_").partition("/")[0]
    return re.sub(r"(_nchwc|_token_\d+)+$", "", name)


def _tensors(values: Iterable[Mapping[str, Sequence[int]]]) -> tuple[Tensor, ...]:
    return tuple((kind, tuple(shape)) for value in values for kind, shape in value.items())


def precision(ran: Sequence[Kernel]) -> str:
    """What the arithmetic ran in: ``"float32"`` or ``"int8 (7 of 8 layers, 1 float32)"``.

    Counted are convolutions and matrix products with weights, by the type their kernel read; without any, all kernels.
    What TensorRT compiled is said to be its choice.
    """
    layers = Counter(kernel.kind for kernel in ran if kernel.is_layer and kernel.kind)
    told = layer_precision(layers or Counter(kernel.kind for kernel in ran if kernel.kind))
    engines = sum(kernel.is_engine for kernel in ran)
    if not engines:
        return told
    return f"TensorRT's choice in {engines} engine{'s' * (engines > 1)}" + (f", else {told}" if layers else "")


def provider_counts(ran: Sequence[Kernel]) -> dict[str, int]:
    """How many nodes each execution provider ran, the one that ran most first."""
    return dict(Counter(kernel.provider for kernel in ran).most_common())


def fallback(ran: Sequence[Kernel], wanted: str) -> list[dict[str, str]]:
    """The nodes that another execution provider ran than the one asked for, but for copies and shapes.

    Returns:
        For each its name (``"node"``), ``"operator"`` and ``"provider"``, ready for JSON.
    """
    return [
        {"node": kernel.node, "operator": kernel.operator, "provider": kernel.provider}
        for kernel in ran
        if kernel.provider != wanted and not kernel.is_bookkeeping
    ]


def refuse_fallback(fallen: Sequence[Mapping[str, str]], ran: Sequence[Kernel], wanted: str) -> None:
    """Raise if there are nodes that fell back.

    Raises:
        BackendError: names the first nodes with operator and provider.
    """
    if not fallen:
        return
    named = [f"{each['node']} ({each['operator']}, {each['provider']})" for each in fallen[:_NAMED]]
    rest = f" and {len(fallen) - _NAMED} more" if len(fallen) > _NAMED else ""
    raise BackendError(
        f"onnxruntime ran {len(fallen)} of {len(ran)} nodes on another provider than {wanted}: "
        f"{', '.join(named)}{rest}",
        "allow it with --allow-fallback (in Python: Target(allow_fallback=True)), or use another backend",
    )


def inserted_casts(ran: Sequence[Kernel], named: Iterable[str]) -> dict[str, int]:
    """Casts that are not in the file: ONNX Runtime puts them around nodes it has no kernel for in their type.

    Args:
        named: the names of the nodes in the file.

    Returns:
        How many there are, by what they cast: ``{"float16 to float32": 12}``. Those of constants that ONNX Runtime
        computed while loading are not among them.
    """
    known = set(named)
    casts = (kernel for kernel in ran if kernel.operator == "Cast" and kernel.node not in known)
    return dict(Counter(f"{_type(cast.inputs)} to {_type(cast.outputs)}" for cast in casts).most_common())


def _type(tensors: tuple[Tensor, ...]) -> str:
    name = tensors[0][0]
    return "float32" if name == "float" else "float64" if name == "double" else name
