"""The composite operators: a convolution or linear layer with what follows it, as one operator.

Each ``torch.ops.optc.<base>[_add][_<activation>]`` computes ``activation(base(input, weight, bias) + other)`` and is
defined by its row in :data:`COMPOSITES`: the schema and the decomposition into plain ATen follow from the row, and from
the decomposition the fake kernel and the kernel of every device without a fused one. The operators are for inference:
they have no autograd formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """An element-wise function a composite may end in.

    Attributes:
        target: the ATen operator that computes it.
        args, kwargs: what it takes besides its input.
        onednn: its name as a oneDNN post-operation in torch's ``mkldnn`` operators.
        onednn_algorithm: oneDNN's variant of it, where there are several.
    """

    target: OpOverload
    args: tuple[float, ...] = ()
    kwargs: Mapping[str, str] = field(default_factory=dict)
    onednn: str = ""
    onednn_algorithm: str = ""


ACTIVATIONS: Mapping[str, Activation] = {
    "relu": Activation(aten.relu.default, onednn="relu"),
    "relu6": Activation(aten.hardtanh.default, (0.0, 6.0), onednn="hardtanh"),
    "hardswish": Activation(aten.hardswish.default, onednn="hardswish"),
    "silu": Activation(aten.silu.default, onednn="swish"),
    "gelu": Activation(aten.gelu.default, onednn="gelu", onednn_algorithm="none"),
    "gelu_tanh": Activation(aten.gelu.default, kwargs={"approximate": "tanh"}, onednn="gelu", onednn_algorithm="tanh"),
    "sigmoid": Activation(aten.sigmoid.default, onednn="sigmoid"),
    "hardsigmoid": Activation(aten.hardsigmoid.default, onednn="hardsigmoid"),
}
"""By the name used in composite operators' names."""


_GEOMETRY_DEFAULTS = ([1, 1], [0, 0], [1, 1], 1)


@dataclass(frozen=True)
class Composite:
    """What a composite operator is made of.

    Attributes:
        name: operator name without its namespace, such as ``"conv2d_add_relu"``.
        base: ``aten.conv2d.default`` or ``aten.linear.default``.
        activation: a key of :data:`ACTIVATIONS`, or ``None``.
        residual: whether ``other``, an operand shaped like the base's output, is added before the activation.
    """

    name: str
    base: OpOverload
    activation: str | None
    residual: bool

    @property
    def schema(self) -> str:
        """The operator's schema: the base's arguments, with ``other`` after the bias."""
        other = ", Tensor other" if self.residual else ""
        geometry = ", int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1" if self.is_conv else ""
        return f"{self.name}(Tensor input, Tensor weight, Tensor? bias{other}{geometry}) -> Tensor"

    @property
    def is_conv(self) -> bool:
        """Whether the base is a 2-D convolution."""
        return self.base is aten.conv2d.default

    def split(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
        """Positional arguments of the composite as (arguments of the base, ``other`` or ``None``)."""
        return (args[:3] + args[4:], args[3]) if self.residual else (args, None)

    def complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All positional arguments, with the schema's defaults for those left out at the end.

        The dispatcher leaves arguments that equal their default out when it calls a kernel written in Python.
        """
        required = 4 if self.residual else 3
        return args + _GEOMETRY_DEFAULTS[len(args) - required :] if self.is_conv else args

    def output_shape(self, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Shape of ``base(input, weight, bias)``; ``args`` are all arguments of the composite, the input batched."""
        x, weight = args[:2]
        if not self.is_conv:
            return (*x.shape[:-1], weight.shape[0])
        stride, padding, dilation = (pair(value) for value in args[-4:-1])
        spatial = (
            (size + 2 * p - d * (kernel - 1) - 1) // s + 1
            for size, kernel, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
        )
        return (x.shape[0], weight.shape[0], *spatial)

    def decomposition(self, *args: Any) -> Tensor:
        """The composite in plain ATen, on tensors."""
        result: Tensor = self.emit(lambda target, a, kw: target(*a, **kw), args)
        return result

    def emit(self, call: Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], Any], args: tuple[Any, ...]) -> Any:
        """Make the composite's ATen calls in order through ``call(target, args, kwargs)``; returns the last one's."""
        base_args, other = self.split(args)
        value = call(self.base, base_args, {})
        if self.residual:
            value = call(aten.add.Tensor, (value, other), {})
        if self.activation:
            activation = ACTIVATIONS[self.activation]
            value = call(activation.target, (value, *activation.args), dict(activation.kwargs))
        return value


def pair(value: Sequence[int]) -> list[int]:
    """A per-dimension argument of a 2-D convolution, which ATen lets be given once for both, as two numbers."""
    return list(value) * 2 if len(value) == 1 else list(value)


def _rows() -> Iterator[Composite]:
    for prefix, base in (("conv2d", aten.conv2d.default), ("linear", aten.linear.default)):
        for activation in ACTIVATIONS:
            yield Composite(f"{prefix}_{activation}", base, activation, residual=False)
        yield Composite(f"{prefix}_add", base, None, residual=True)
    yield Composite("conv2d_add_relu", aten.conv2d.default, "relu", residual=True)


_library = torch.library.Library("optc", "DEF")


def _define(row: Composite) -> OpOverload:
    """Register the operator; its decomposition serves as fake kernel and as kernel of every device."""
    _library.define(row.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(row.name, row.decomposition, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optc::{row.name}", row.decomposition, lib=_library)
    overload: OpOverload = getattr(torch.ops.optc, row.name).default
    return overload


COMPOSITES: Mapping[OpOverload, Composite] = {_define(row): row for row in _rows()}
"""Every composite operator and what it is made of."""

_BY_PARTS = {(row.base, row.activation, row.residual): overload for overload, row in COMPOSITES.items()}


def find_composite(base: OpOverload, activation: str | None = None, residual: bool = False) -> OpOverload | None:
    """The composite operator made of these parts, or ``None`` if there is none."""
    return _BY_PARTS.get((base, activation, residual))


def register_kernel(name: str, dispatch_key: str, kernel: Callable[..., Tensor]) -> None:
    """Give a composite a fused kernel for one dispatch key (``"CPU"``, ``"CUDA"``)."""
    _library.impl(name, kernel, dispatch_key)
