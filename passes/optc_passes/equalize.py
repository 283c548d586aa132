"""Equalize channels before quantization, without changing what the model computes.

A quantized activation has one scale for all channels, so those much smaller than the largest lose most of their bits.
``X·W = (X/s)·(s·W)``: what computes ``X`` is scaled by 1/s per channel, and the layers that read it by s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx

from optc import Change, Pass, PassContext, PassOptions, PassResult, Program, Skip
from optc.ops import COMPOSITES
from optc.rewrite import add_constant, argument, constant_of, erase_unused, is_call, label, set_argument, shape
from optc_passes.calibration import checked
from optc_passes.channels import layers_after
from optc_passes.layers import Layer, as_layer, as_reader, scale_input, scale_output

aten = torch.ops.aten
_LIMIT = 1e4
"""Largest ratio of the factors within one value, so that no weight leaves float's precise range."""


_DEAD = 1e-6
"""Share of the largest channel below which one says nothing: it would move the mean and not be heard."""
_WORTHWHILE = 1.05
"""A smaller spread of factors changes nothing; so a second run finds nothing to do."""


class EqualizeOptions(PassOptions):
    """Options of ``equalize``."""

    strength: float = Field(
        0.5,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="how much of an activation's spread moves into the weights that read it",
    )


class Equalize(Pass):
    """Scale channels so that activations and the weights that read them spread alike.

    After a layer norm this is SmoothQuant (Xiao et al., ICML 2023, arXiv:2211.10438): s = max|X|^α / max|W|^(1-α) with
    activations from calibration. Between two layers, with a ReLU or none between them, it is cross-layer equalization
    (Nagel et al., ICCV 2019, arXiv:1906.04721), which takes the weights that compute X for X where there is no
    calibration data.
    """

    name = "equalize"
    summary = "Even out channels between layers (SmoothQuant, cross-layer equalization), before quant."
    Options = EqualizeOptions
    options: EqualizeOptions

    def run(self, program: Program, context: PassContext) -> PassResult:
        sources: list[_Source] = []
        skipped: list[Skip] = []
        for node in program.graph.nodes:
            source = _source(program, node)
            if isinstance(source, str):
                skipped.append(Skip(self.name, node.name, source))
            elif source is not None:
                sources.append(source)
        ranges = _ranges(program, sources, context)
        applied = []
        for source in sources:
            seen = ranges.get(source.value)
            factors = self._factors(program, source, _own_range(program, source) if seen is None else seen)
            spread = float(factors.max() / factors.min())
            if spread < _WORTHWHILE:
                continue
            for reader in source.readers:
                scale_input(program, reader, factors, None)
            source.scale(program, 1 / factors)
            applied.append(Change(self.name, source.node.name, f"channels moved by up to {spread:.1f}x"))
        return PassResult(program, bool(applied), tuple(applied), tuple(skipped))

    def _factors(self, program: Program, source: _Source, peaks: Tensor) -> Tensor:
        """s per channel, float64, of geometric mean 1; 1 for channels that are as good as always 0 or unread."""
        weights = torch.stack([_input_range(program, reader) for reader in source.readers]).amax(0)
        alpha = self.options.strength
        usable = (peaks > _DEAD * peaks.max()) & (weights > _DEAD * weights.max())
        one = torch.ones_like(peaks)
        factors = torch.where(usable, peaks, one) ** alpha / torch.where(usable, weights, one) ** (1 - alpha)
        mean = factors[usable].log().mean().exp() if bool(usable.any()) else factors.new_ones(())
        bound = _LIMIT**0.5
        return torch.where(usable, (factors / mean).clamp(1 / bound, bound), one)


@dataclass(frozen=True)
class _Source:
    """Where a value with channels comes from, and the layers that read it.

    Attributes:
        node: the layer norm or layer that computes it.
        value: what is read: ``node``, or the ReLU behind it.
    """

    node: fx.Node
    value: fx.Node
    readers: tuple[Layer, ...]

    def scale(self, program: Program, factors: Tensor) -> None:
        """Let the source compute its output times ``factors`` (positive, float64, one per channel); in place."""
        layer = as_reader(self.node)
        if layer is not None:
            scale_output(program, layer, factors, None)
            return
        for name in ("weight", "bias"):
            old = argument(self.node, name)
            tensor = constant_of(program, old)
            if tensor is None and name == "bias":
                continue
            like = tensor if tensor is not None else torch.ones(len(factors), dtype=self.node.meta["val"].dtype)
            scaled = (like.double() * factors.to(like.device)).to(like.dtype)
            hint = str(old.target) if tensor is not None else f"{self.node.name}_{name}"
            set_argument(self.node, name, add_constant(program, self.node, hint, scaled))
            erase_unused((old,))


def _source(program: Program, node: fx.Node) -> _Source | str | None:
    """The source at a node, the reason why it cannot be scaled, or ``None`` for any other node."""
    value, axis = node, len(shape(node)) - 1 if is_call(node, aten.layer_norm.default) else -1
    if is_call(node, aten.layer_norm.default):
        reason = _norm_obstacle(program, node)
    else:
        layer = as_reader(node)
        if layer is None:
            return None
        row = COMPOSITES.get(node.target)  # type: ignore[call-overload]
        if row is not None and (row.residual or row.activation not in (None, "relu")):
            what = "a residual" if row.residual else row.activation
            return f"{what} is fused to it, which does not commute with scaling"
        axis, reason = layer.output_axis, layer.not_constant(program)
        if len(node.users) == 1 and is_call(user := next(iter(node.users)), aten.relu.default):
            value = user
    if reason:
        return reason
    readers = layers_after(program, value, axis, shifted=False)
    if isinstance(readers, str):
        return readers
    if as_layer(node) and any(reader.groups > 1 for reader in readers) and readers[0].groups != shape(value)[axis]:
        return f"{label(readers[0].node)} after it has groups of several channels"
    return _Source(node, value, tuple(readers))


def _norm_obstacle(program: Program, node: fx.Node) -> str | None:
    if len(argument(node, "normalized_shape")) != 1:
        return "it normalises over several dimensions"
    for name in ("weight", "bias"):
        constant = argument(node, name)
        if constant is not None and constant_of(program, constant) is None:
            return f"its {name} is not a constant"
    return None


@torch.no_grad()
def _ranges(program: Program, sources: list[_Source], context: PassContext) -> dict[fx.Node, Tensor]:
    """Largest magnitude of each channel that calibration sees, float64; empty without calibration data."""
    if context.calibration is None or not sources:
        return {}
    axes = {source.value: _axis(source) for source in sources}
    peaks: dict[fx.Node, Tensor] = {}

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in axes:
                seen = value.abs().movedim(axes[n], 0).flatten(1).amax(1).double()
                peaks[n] = torch.maximum(peaks[n], seen) if n in peaks else seen
            return value

    for batch in checked(context.calibration, len(program.example_inputs), context):
        Watcher(program.module).run(*batch)
    return peaks


def _axis(source: _Source) -> int:
    layer = as_reader(source.node)
    return len(shape(source.node)) - 1 if layer is None else layer.output_axis


def _own_range(program: Program, source: _Source) -> Tensor:
    """What stands for a value's range where nothing was seen: its layer's weights, or its layer norm's."""
    weight = constant_of(program, argument(source.node, "weight"))
    layer = as_reader(source.node)
    if weight is None:
        return torch.ones(shape(source.node)[-1], dtype=torch.float64)
    if layer is not None and layer.transposed:
        return weight.detach().double().abs().transpose(0, 1).flatten(1).amax(1).repeat(layer.groups)
    return weight.detach().double().abs().flatten(1).amax(1) if layer is not None else weight.detach().double().abs()


def _input_range(program: Program, reader: Layer) -> Tensor:
    """Largest magnitude of the weights that each input channel meets, float64."""
    weight = constant_of(program, argument(reader.node, "weight"))
    assert weight is not None, "layers_after takes layers with constant weights only"
    wide = weight.detach().double().abs()
    if reader.transposed:
        return wide.flatten(1).amax(1)
    grouped = wide.unflatten(0, (reader.groups, -1)).transpose(1, 2)  # (groups, in/groups, out/groups, …)
    return torch.amax(grouped.flatten(2), 2).flatten()
