"""How much noise quantization adds: to a program's outputs, and by each layer on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from optc import Program, compare
from optc_passes.calibration import Batch
from optc_passes.quant_bias import mean_shift
from optc_passes.quant_blocks import Rounded
from optc_passes.quant_local import WEIGHTS_ALONE, LocalFormat
from optc_passes.quant_plan import Layer, Plan
from optc_passes.quant_reach import Reach
from optc_passes.torchao_pt2e import ObserverBase

Levels = dict[tuple[str, str], float]
"""SQNR in dB by name of a layer's node and format."""
REMEMBERED = ("int4-weights",)
"""Formats whose rounding depends on what a layer reads (GPTQ). Others are found again quickly and would take memory."""


def sqnr_db(reference: Tensor, value: Tensor) -> float:
    """Signal-to-quantization-noise ratio 10·log10(Σ ref² / Σ (ref − value)²) in dB; ``inf`` without noise."""
    exact = reference.double()
    noise = float((exact - value.double()).square().sum())
    if noise == 0.0:
        return float("inf")
    return float(10 * torch.log10(exact.square().sum() / noise))


def output_sqnr(program: Program, batches: Sequence[Batch], references: Sequence[Batch]) -> float:
    """SQNR in dB of a program's worst output over all batches together, as verification takes it.

    Args:
        references: the outputs wanted, batch by batch.
    """
    return compare(references, [program.run(*batch) for batch in batches]).sqnr_db


class NoiseMeter(fx.Interpreter):
    """Runs the float program and computes every layer a second time in each of the formats asked for.

    Args:
        observers: calibrated observers by the name of the value they saw; what static int8 rounds with.
        formats: the formats to try, by name of the layer's node.
        local: the formats that are not static int8, by name.
        reach: what noise of layers does to the outputs, if that is to be estimated.
        fits: whether biases and roundings are fitted to the inputs; not where those are no data.

    Attributes:
        outputs: SQNR in dB of the model's outputs, estimated, when that layer alone has the format, by (name, format).
        sqnr: SQNR in dB of the layer's output when that layer alone has the format, by (name, format).
        uncorrected: ``sqnr`` and ``outputs`` of static int8 where the bias is left as it is; above it is corrected.
        shifts: by how much rounding its weight moves the mean of its output, channel by channel, likewise; of formats
            whose bias may be corrected.
        rounded: what formats store of a weight where that takes long to find, likewise.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        plan: Plan,
        observers: Mapping[str, ObserverBase],
        formats: Mapping[str, Sequence[str]],
        local: Mapping[str, LocalFormat],
        reach: Reach | None = None,
        fits: bool = True,
    ) -> None:
        super().__init__(module)
        self._fits = fits
        self._reach = reach
        self.outputs: Levels = {}
        self._layers = {layer.node: layer for layer in plan.layers}
        self._observers, self._formats, self._local = observers, formats, local
        self.sqnr: Levels = {}
        self.uncorrected: tuple[Levels, Levels] = {}, {}
        self.shifts: dict[tuple[str, str], Tensor] = {}
        self.rounded: dict[tuple[str, str], Rounded] = {}

    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        layer = self._layers.get(node)
        for form in self._formats.get(node.name, ()) if layer is not None else ():
            assert layer is not None
            (x, exact, *rest), kwargs = self.fetch_args_kwargs_from_env(node)
            wanted = _behind(layer, value)
            if form in self._local:
                rounded = self._local[form].rounded(x if self._fits else x.new_empty(0, x.shape[-1]), exact)
                given, weight = self._local[form].effect(x, exact, rounded)
                if form in REMEMBERED:
                    self.rounded[node.name, form] = rounded
            else:
                given, weight = (self._round(node.args[i], each) for i, each in enumerate((x, exact)))
            operands = [given, weight, *rest]
            corrects = form in WEIGHTS_ALONE or form not in self._local
            if corrects and rest and rest[0] is not None and self._fits:
                if form not in self._local:
                    self._look(layer, form, wanted, node.target(*operands, **kwargs), *self.uncorrected)  # type: ignore[operator]
                shift = self.shifts[node.name, form] = mean_shift(node, x, weight - exact)
                operands[2] = rest[0] - shift
            self._look(layer, form, wanted, node.target(*operands, **kwargs), self.sqnr, self.outputs)  # type: ignore[operator]
        return value

    def _look(self, layer: Layer, form: str, wanted: Tensor, value: Tensor, own: Levels, outputs: Levels) -> None:
        """Write down how far a layer's value in a format is from the one wanted, and what that does to the outputs."""
        got = _behind(layer, value)
        name = layer.node.name
        if layer.is_conv and form not in self._local:
            got = self._round(layer.tail, got)
        own[name, form] = sqnr_db(wanted, got)
        if self._reach is not None and name in self._reach.gradients:
            outputs[name, form] = self._reach.sqnr_db(name, got - wanted)

    def _round(self, source: Any, value: Tensor) -> Tensor:
        observer: Any = self._observers[source.name]
        scale, zero_point = observer.calculate_qparams()
        low, high = observer.quant_min, observer.quant_max
        if hasattr(observer, "ch_axis"):
            return torch.fake_quantize_per_channel_affine(value, scale, zero_point.int(), observer.ch_axis, low, high)
        return torch.fake_quantize_per_tensor_affine(value, float(scale), int(zero_point), low, high)


def _behind(layer: Layer, value: Tensor) -> Tensor:
    """The layer's output as it leaves the rectifier behind it."""
    if layer.tail is layer.node:
        return value
    result: Tensor = layer.tail.target(value, *layer.tail.args[1:], **layer.tail.kwargs)  # type: ignore[operator]
    return result
