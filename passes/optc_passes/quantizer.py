"""The quantizer: writes a plan as torchao PT2E annotations on ATen nodes and composite operators.

Annotating nodes of the flat graph, and not source partitions, does not depend on which modules the graph came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from optc import Program
from optc.rewrite import constant_of
from optc_passes.observers import PerChannelWeightObserver
from optc_passes.quant_plan import Layer, Plan, operands
from optc_passes.torchao_pt2e import (
    DerivedQuantizationSpec,
    ObserverBase,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

ANNOTATION = "quantization_annotation"
INT32 = torch.iinfo(torch.int32)

# Weights leave out -128: symmetric, and what the VNNI and AMX kernels of oneDNN and MLAS are written for.
WEIGHT = QuantizationSpec(
    dtype=torch.int8,
    observer_or_fake_quant_ctr=PerChannelWeightObserver,
    quant_min=-127,
    quant_max=127,
    qscheme=torch.per_channel_symmetric,
    ch_axis=0,
)


def activation_spec(observer: Any, symmetric: bool) -> QuantizationSpec:
    """Per-tensor affine uint8, or symmetric int8.

    On x86 the int8 dot-product instructions take an unsigned and a signed operand; tensor cores take two signed ones,
    and TensorRT no zero point.
    """
    return QuantizationSpec(
        dtype=torch.int8 if symmetric else torch.uint8,
        observer_or_fake_quant_ctr=observer,
        quant_min=-128 if symmetric else 0,
        quant_max=127 if symmetric else 255,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
    )


class Int8Quantizer(Quantizer):
    """Annotates what a :class:`~optc_passes.quant_plan.Plan` says.

    Args:
        program: the program the plan was made for.
        observer: constructor of the activation observer.
        symmetric: whether activations are symmetric int8 instead of affine uint8.
        observed: observers by the name of the value they saw, from an earlier preparation of the same program; used
            instead of new ones.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        observer: Any,
        symmetric: bool = False,
        observed: Mapping[str, ObserverBase] | None = None,
    ) -> None:
        self._program = program
        self._plan = plan
        self._activation = activation_spec(observer, symmetric)
        self._observed = observed or {}
        self.observers: dict[str, ObserverBase] = {}

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        """Write the annotations into ``node.meta``."""
        for layer in self._plan.layers:
            self._annotate_layer(layer)
        for node in model.graph.nodes:
            if node in self._plan.shared:
                first, *others = operands(node)
                same = SharedQuantizationSpec((first, node))
                _annotate(node, {first: self._activation, **dict.fromkeys(others, same)}, same)
            elif node in self._plan.rescaled:
                _annotate(node, dict.fromkeys(operands(node), self._activation))
                _annotate(self._plan.rescaled[node], output=self._activation)
        return model

    def _annotate_layer(self, layer: Layer) -> None:
        inputs: dict[fx.Node, Any] = {layer.activation: self._activation, layer.weight: WEIGHT}
        if layer.bias is not None:
            # Runtimes add the bias to the int32 products, so it needs their scale and is exact to half a step.
            inputs[layer.bias] = DerivedQuantizationSpec(
                derived_from=[(layer.activation, layer.node), (layer.weight, layer.node)],
                derive_qparams_fn=_bias_parameters,
                dtype=torch.int32,
                quant_min=INT32.min,
                quant_max=INT32.max,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
            )
        _annotate(layer.node, inputs)
        if layer.is_conv:
            _annotate(layer.tail, output=self._activation)

    def validate(self, model: fx.GraphModule) -> None:
        """Nothing to check: the plan holds only what the runtimes support."""

    def prepare_obs_or_fq_callback(self, model: fx.GraphModule, edge_or_node_to_obs_or_fq: dict[Any, Any]) -> None:
        """Put earlier observers back in and let each weight's observer know its bias."""
        observers = edge_or_node_to_obs_or_fq
        for place in observers:
            value = place[0] if isinstance(place, tuple) else place
            if self._observed:
                observers[place] = self._observed[value.name]
            self.observers[value.name] = observers[place]
        for layer in self._plan.layers:
            if layer.bias is not None:
                bias = constant_of(self._program, layer.bias)
                assert bias is not None
                source, weight, derived = (
                    observers[value, layer.node] for value in (layer.activation, layer.weight, layer.bias)
                )
                weight.layer = (source, bias)
                derived.obs_or_fqs = [source, weight]


def _annotate(node: fx.Node, inputs: dict[fx.Node, Any] | None = None, output: Any = None) -> None:
    annotation = node.meta.setdefault(ANNOTATION, QuantizationAnnotation(_annotated=True))
    annotation.input_qspec_map.update(inputs or {})
    if output is not None:
        annotation.output_qspec = output


def _bias_parameters(observers: list[Any]) -> tuple[Tensor, Tensor]:
    """Scale of a layer's int32 bias, shape [channels]: its input's times its weight's; zero point 0."""
    activation, weight = (observer.calculate_qparams()[0] for observer in observers)
    scale = activation * weight
    return scale, torch.zeros(scale.shape, dtype=torch.int32)
