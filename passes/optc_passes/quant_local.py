"""Formats that a layer can have without its neighbours: half precision, int8 with dynamic ranges, weights in blocks."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from optc import Change, Program
from optc.rewrite import add_constant, argument, constant_of, erase_unused, set_argument
from optc_passes.quant_blocks import BlockFormat, Rounded, Size
from optc_passes.quant_plan import LINEARS

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed
_EPS = torch.finfo(torch.float32).tiny
WEIGHTS_ALONE = ("int8-weights", "int4-weights")
"""Formats that need no calibration data. Where there is some, they get their bias corrected."""


class LocalFormat(Protocol):
    """A format of one layer, written where the layer stands."""

    @property
    def name(self) -> str:
        """Such as ``"int4-weights"``."""

    def refusal(self, node: fx.Node, weight: Tensor) -> str | None:
        """Why a layer cannot have the format, or ``None``."""

    def rounded(self, x: Tensor, weight: Tensor) -> Rounded:
        """What is stored of a weight, which may depend on what the layer reads in calibration."""

    def effect(self, x: Tensor, weight: Tensor, rounded: Rounded) -> tuple[Tensor, Tensor]:
        """Input and weight as the layer sees them, in float."""

    def store(self, program: Program, node: fx.Node, rounded: Rounded) -> Change:
        """Write the format into the graph; in place."""

    def stored_bytes(self, weight: Size) -> int:
        """Bytes of a weight of that shape, with what it needs."""


@dataclass(frozen=True)
class DynamicInt8:
    """8-bit weights, a scale per output channel; activations rounded to 8 bits by the range each call finds.

    As in ONNX's DynamicQuantizeLinear; onnxruntime runs it with its neighbours as one DynamicQuantizeMatMul.
    """

    weight_limit: int = 127
    name = "int8-dynamic"

    def refusal(self, node: fx.Node, weight: Tensor) -> str | None:
        """Only matrix products can."""
        return None if node.target in LINEARS else "runtimes find ranges at run time for matrix products only"

    def rounded(self, x: Tensor, weight: Tensor) -> Rounded:
        """int8 weight and float32 scales (outputs,)."""
        peak = weight.detach().float().abs().amax(1)
        scale = torch.where(peak > 0, peak, torch.ones_like(peak)) / self.weight_limit
        return (weight.detach() / scale[:, None]).round_().to(torch.int8), scale

    def effect(self, x: Tensor, weight: Tensor, rounded: Rounded) -> tuple[Tensor, Tensor]:
        """Both fake-quantized."""
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = max((high - low) / 255, _EPS)
        zero = min(max(round(-low / scale), 0), 255)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, 255), rounded[0] * rounded[1][:, None]

    def store(self, program: Program, node: fx.Node, rounded: Rounded) -> Change:
        """Quantize and dequantize with parameters chosen in the graph, and a dequantized weight."""
        source, old = argument(node, "input"), argument(node, "weight")
        hint, call = str(old.target), node.graph.call_function
        zeros = torch.zeros(len(rounded[1]), dtype=torch.int8)
        constants = [
            add_constant(program, node, f"{hint}{suffix}", value)
            for suffix, value in (("_int8", rounded[0]), ("_scale", rounded[1]), ("_zero_point", zeros))
        ]
        limits = (0, 255)
        with node.graph.inserting_before(node):
            chosen = call(decomposed.choose_qparams.tensor, (source, *limits, _EPS, torch.uint8))
            scale, zero = (call(operator.getitem, (chosen, index)) for index in range(2))
            integers = call(decomposed.quantize_per_tensor.tensor, (source, scale, zero, *limits, torch.uint8))
            x = call(decomposed.dequantize_per_tensor.tensor, (integers, scale, zero, *limits, torch.uint8))
            weight = call(
                decomposed.dequantize_per_channel.default,
                (*constants, 0, -self.weight_limit, self.weight_limit, torch.int8),
            )
        x.meta.update({key: source.meta[key] for key in ("val", "dims") if key in source.meta})
        set_argument(node, "input", x)
        set_argument(node, "weight", weight)
        erase_unused((old,))
        return Change(self.name, node.name, hint)

    def stored_bytes(self, weight: Size) -> int:
        """A byte a weight, five a channel."""
        return math.prod(weight) + 5 * weight[0]


@dataclass(frozen=True)
class Half:
    """The layer in bfloat16 or float16, between casts."""

    dtype: torch.dtype

    @property
    def name(self) -> str:
        """``"bf16"`` or ``"fp16"``."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp16"

    def refusal(self, node: fx.Node, weight: Tensor) -> str | None:
        """Weights that the type cannot hold."""
        largest = float(weight.detach().abs().max())
        if largest > torch.finfo(self.dtype).max:
            return f"its weights reach {largest:.3g}, which {self.name} cannot hold"
        return None

    def rounded(self, x: Tensor, weight: Tensor) -> Rounded:
        """The weight in that type."""
        return (weight.detach().to(self.dtype),)

    def effect(self, x: Tensor, weight: Tensor, rounded: Rounded) -> tuple[Tensor, Tensor]:
        """Both rounded to that type."""
        return x.to(self.dtype).float(), rounded[0].float()

    def store(self, program: Program, node: fx.Node, rounded: Rounded) -> Change:
        """Cast what the layer reads, and its output back."""
        graph, hint = node.graph, str(argument(node, "weight").target)
        operands = [name for name in ("input", "bias", "other") if _takes(node, name)]
        stored = add_constant(program, node, f"{hint}_{self.name}", rounded[0])
        for name in operands:
            old = argument(node, name)
            value = constant_of(program, old)
            if value is not None:
                set_argument(node, name, add_constant(program, node, f"{old.target}_{self.name}", value.to(self.dtype)))
            else:
                with graph.inserting_before(node):
                    set_argument(node, name, graph.call_function(aten._to_copy.default, (old,), {"dtype": self.dtype}))
            erase_unused((old,))
        old = argument(node, "weight")
        set_argument(node, "weight", stored)
        erase_unused((old,))
        with graph.inserting_after(node):
            back = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float32})
        node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
        back.meta.update({key: node.meta[key] for key in ("val", "dims") if key in node.meta})
        node.meta.pop("val", None)
        return Change(self.name, node.name, hint)

    def stored_bytes(self, weight: Size) -> int:
        """Two bytes a weight."""
        return 2 * math.prod(weight)


def _takes(node: fx.Node, name: str) -> bool:
    known = {parameter.name for parameter in node.target._schema.arguments}  # type: ignore[union-attr]
    return name in known and isinstance(argument(node, name), fx.Node)


def local_formats(block: int, weight_limit: int) -> Mapping[str, LocalFormat]:
    """The formats by name, the most exact first.

    Args:
        block: weights that share a scale.
        weight_limit: largest magnitude of an 8-bit weight that meets 8-bit activations.
    """
    formats: tuple[LocalFormat, ...] = (
        Half(torch.float16),
        Half(torch.bfloat16),
        DynamicInt8(weight_limit),
        BlockFormat(8, block),
        BlockFormat(4, block),
    )
    return {form.name: form for form in formats}
