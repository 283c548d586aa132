"""The quantizer: writes a plan as torchao PT2E annotations on ATen nodes and composite operators.

Annotating nodes of the flat graph, and not source partitions, does not depend on which modules the graph came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from optc import PassContext, Program
from optc.rewrite import constant_of, is_call
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

SATURATES = (
    "this CPU has no int8 dot-product instructions (VNNI, AMX): int8 may be slower than float32, and its kernels add"
    " pairs of products in 16 bits, so weights are quantized to 7 bits, which cannot overflow there"
)


@dataclass(frozen=True)
class Int8Kernels:
    """What the int8 kernels of a target take.

    Attributes:
        symmetric: activations symmetric int8 instead of affine uint8. On x86 the int8 dot-product instructions take an
            unsigned and a signed operand; tensor cores take two signed ones, and TensorRT no zero point.
        centre: affine activations whose range is nearly symmetric get one that is. oneDNN's kernels make up for a
            zero point at a cost that shows with AMX, and a middle one is none to a runtime that stores int8 instead.
        weight_limit: largest magnitude of a weight. 127 leaves out -128: symmetric, and what the VNNI and AMX kernels
            of oneDNN and MLAS are written for. Before VNNI, ``vpmaddubsw`` adds two products of 8 bits and saturates at
            16: 2 · 255 · 64 is the most that fits (oneDNN, "Nuances of int8 computations").
        attention: whether there are some that multiply queries by keys. OpenVINO has them for symmetric ones.
    """

    symmetric: bool = False
    centre: bool = False
    weight_limit: int = 127
    attention: bool = True

    @classmethod
    def of(cls, context: PassContext) -> Int8Kernels:
        """Those of the context's target."""
        if context.target.device == "cuda":
            return cls(symmetric=True, attention=False)
        return cls(centre="amx_int8" in (context.isa or ()), weight_limit=64 if context.saturates_int8 else 127)

    @property
    def saturates(self) -> bool:
        """Whether full 8-bit weights would overflow."""
        return self.weight_limit < 127

    @property
    def weight(self) -> QuantizationSpec:
        """Per-channel symmetric int8."""
        return QuantizationSpec(
            dtype=torch.int8,
            observer_or_fake_quant_ctr=PerChannelWeightObserver,
            quant_min=-self.weight_limit,
            quant_max=self.weight_limit,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    def activation(self, observer: Any) -> QuantizationSpec:
        """Per-tensor affine uint8, or symmetric int8, whose range ``observer`` (a constructor) finds."""
        return _symmetric(observer) if self.symmetric else _affine(observer)


def _affine(observer: Any) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.uint8,
        observer_or_fake_quant_ctr=observer,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
    )


def _symmetric(observer: Any) -> QuantizationSpec:
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=observer,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_symmetric,
    )


class Int8Quantizer(Quantizer):
    """Annotates what a :class:`~optc_passes.quant_plan.Plan` says.

    Args:
        program: the program the plan was made for.
        observer: constructor of the activation observer.
        kernels: what the target's int8 kernels take.
        observed: observers by the name of the value they saw, from an earlier preparation of the same program; used
            instead of new ones.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan,
        observer: Any,
        kernels: Int8Kernels,
        observed: Mapping[str, ObserverBase] | None = None,
    ) -> None:
        self._program = program
        self._plan = plan
        self._activation, self._weight = kernels.activation(observer), kernels.weight
        self._attention = _symmetric(observer)
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
        for node in self._plan.attention:
            _annotate(node, dict.fromkeys(node.args[:2], self._attention))  # type: ignore[arg-type]
        return model

    def _annotate_layer(self, layer: Layer) -> None:
        inputs: dict[fx.Node, Any] = {layer.activation: self._activation, layer.weight: self._weight}
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
            if (earlier := self._earlier(value)) is not None:
                observers[place] = earlier
            assert earlier or not self._observed or value.op == "get_attr", f"calibration saw nothing of {value.name}"
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

    def _earlier(self, value: fx.Node) -> ObserverBase | None:
        """What saw a value in an earlier preparation; a layer in half precision has a cast behind it since."""
        if value.name not in self._observed and is_call(value, torch.ops.aten._to_copy.default):
            (value,) = value.all_input_nodes
        return self._observed.get(value.name)


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
