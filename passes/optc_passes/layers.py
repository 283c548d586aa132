"""Linear layers (convolutions, transposed convolutions, fully connected) and how to scale what goes in or comes out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, fx

from optc import Program
from optc.ops import COMPOSITES
from optc.rewrite import add_constant, argument, constant_of, erase_unused, is_call, set_argument, shape

aten = torch.ops.aten
LINEARS = (aten.linear.default,)
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
)
DECOMPOSED = "a decomposed layer: export the model without run_decompositions()"
"""What ``aten.convolution`` is, for messages; of ``conv2d`` and its like, more is known."""
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass(frozen=True)
class Layer:
    """A node that applies ``weight·x + bias`` along a channel axis, and what a composite operator does after that."""

    node: fx.Node

    @property
    def input(self) -> fx.Node:
        return self.node.args[0]  # type: ignore[return-value]

    @property
    def is_linear(self) -> bool:
        """Whether it is fully connected."""
        row = COMPOSITES.get(self.node.target)  # type: ignore[call-overload]
        return is_call(self.node, *LINEARS) if row is None else not row.is_conv

    @cached_property
    def transposed(self) -> bool:
        if is_call(self.node, aten.convolution.default):
            return bool(argument(self.node, "transposed"))
        return is_call(self.node, *TRANSPOSED)

    @property
    def groups(self) -> int:
        return 1 if self.is_linear else int(argument(self.node, "groups"))

    def _channel_axis(self, value: fx.Node) -> int:
        if self.is_linear:
            return len(shape(value)) - 1
        spatial = len(shape(argument(self.node, "weight"))) - 2
        return len(shape(value)) - spatial - 1

    @property
    def input_axis(self) -> int:
        """Dimension of the input that holds its channels."""
        return self._channel_axis(self.input)

    @property
    def output_axis(self) -> int:
        """Dimension of the output that holds its channels."""
        return self._channel_axis(self.node)

    @property
    def output_channels(self) -> int:
        return shape(self.node)[self.output_axis]

    @property
    def pads(self) -> bool:
        """Whether borders see zeros that are not the input's: adding to the input is not adding to those."""
        if self.is_linear:
            return False
        padding = argument(self.node, "padding")
        return self.transposed or (padding != "valid" if isinstance(padding, str) else any(p != 0 for p in padding))

    def not_constant(self, program: Program) -> str | None:
        """Which of weight and bias is no constant that can be scaled by channels, and why; ``None`` if both are."""
        for name in ("weight", "bias"):
            value = argument(self.node, name)
            if value is None and name == "bias":
                continue
            tensor = constant_of(program, value)
            if tensor is None:
                return f"the {name} of {self.node.name} is not a constant"
            if not tensor.is_floating_point():
                return f"the {name} of {self.node.name} is {str(tensor.dtype).removeprefix('torch.')}"
            if name == "weight" and tensor.ndim < 2:
                return f"the weight of {self.node.name} is a vector"
            if name == "bias" and tuple(tensor.shape) != (self.output_channels,):
                return f"the bias of {self.node.name} is not one number per output channel"
        return None


def as_reader(node: object) -> Layer | None:
    """The layer at a node, which may have an activation or a residual fused to it: what it reads can be scaled."""
    if isinstance(node, fx.Node) and is_call(node, *COMPOSITES):
        return Layer(node)
    return as_layer(node)


def as_layer(node: object) -> Layer | None:
    """The layer at a node, or ``None`` if the node is anything else, a layer with something fused to it included."""
    return Layer(node) if isinstance(node, fx.Node) and is_call(node, *LINEARS, *CONVOLUTIONS, *TRANSPOSED) else None


def scale_output(program: Program, layer: Layer, scale: Tensor, shift: Tensor | None) -> None:
    """Rewrite a layer's constants so that it computes ``scale·y + shift`` per output channel in place of ``y``.

    Args:
        scale, shift: float64, one value per output channel.
    """
    weight = _constant(program, layer, "weight")
    scale, shift = scale.to(weight.device), None if shift is None else shift.to(weight.device)
    groups = layer.groups if layer.transposed else 1
    wide = _writable(weight)
    if layer.transposed:  # (in, out/groups, …): output channel g·(out/groups)+j sits at [rows of group g, j]
        grouped = wide.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
        grouped.mul_(scale.view(groups, 1, weight.shape[1], 1))
    else:
        wide.view(weight.shape[0], -1).mul_(scale.view(-1, 1))
    bias = argument(layer.node, "bias")
    new_bias = None if bias is None else _constant(program, layer, "bias").double() * scale
    if shift is not None:
        new_bias = shift if new_bias is None else new_bias + shift
    _set_constants(program, layer, wide, new_bias)


def scale_input(program: Program, layer: Layer, scale: Tensor, shift: Tensor | None) -> None:
    """Rewrite a layer's constants so that on ``x`` it computes what it did on ``scale·x + shift`` per input channel.

    Args:
        scale, shift: float64, one value per input channel; a shift only where the layer does not pad.
    """
    weight = _constant(program, layer, "weight")
    scale, shift = scale.to(weight.device), None if shift is None else shift.to(weight.device)
    wide = _writable(weight)
    if layer.transposed:
        grouped = wide.view(1, weight.shape[0], weight.shape[1], -1)
        per_input = (1, -1, 1, 1)
    else:  # (out, in/groups, …): output channel o reads the inputs of group o // (out/groups)
        groups = layer.groups
        grouped = wide.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
        per_input = (groups, 1, weight.shape[1], 1)
    bias = argument(layer.node, "bias")
    new_bias = None if bias is None else _constant(program, layer, "bias").double()
    if shift is not None:
        moved = (grouped * shift.view(per_input)).sum((2, 3)).flatten()
        new_bias = moved if new_bias is None else new_bias + moved
    grouped.mul_(scale.view(per_input))
    _set_constants(program, layer, wide, new_bias)


def _constant(program: Program, layer: Layer, name: str) -> Tensor:
    value = constant_of(program, argument(layer.node, name))
    assert value is not None, "callers check Layer.not_constant"
    return value.detach()


def _writable(weight: Tensor) -> Tensor:
    """A row-major float64 copy, whatever the memory format (channels last) of the weight."""
    return weight.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _set_constants(program: Program, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    """Give the layer new constants in its own precision and memory format; unused old ones go.

    The new weight takes over the old one's ``meta["val"]``: a layer between two norms is rewritten twice in one pass.
    """
    old_weight, old_bias = argument(layer.node, "weight"), argument(layer.node, "bias")
    hint = str(old_weight.target)
    value = torch.empty_like(_constant(program, layer, "weight")).copy_(weight)
    new_weight = add_constant(program, layer.node, hint, value)
    new_weight.meta.update({key: old_weight.meta[key] for key in ("val", "dims") if key in old_weight.meta})
    set_argument(layer.node, "weight", new_weight)
    if bias is not None:
        hint = str(old_bias.target) if old_bias is not None else hint.removesuffix("weight").rstrip("._") + ".bias"
        set_argument(layer.node, "bias", add_constant(program, layer.node, hint.lstrip("."), bias.to(value.dtype)))
    erase_unused((old_weight, old_bias))
