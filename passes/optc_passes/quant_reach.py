"""How far a layer's noise reaches: what it does to the model's outputs, estimated for all layers at once."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from optc import Program
from optc.ops import COMPOSITES
from optc.rewrite import arguments, dims, is_call, shape
from optc_passes.quant_plan import Layer

ROUNDS = 8
"""Random directions where some layer's images are not told apart, so that each direction is a single sample of it."""
IMAGES, SAMPLES = 16, 16
"""Most images, and how many random directions over all of them: the noise's power is off by some 35 %, or 1.5 dB."""
ELEMENTS = 2**28
"""Most numbers that all gradients together may have."""


@dataclass(frozen=True)
class Reach:
    """Gradients of random sums of a program's outputs, by which a layer's error becomes the outputs' error.

    Attributes:
        images: how many of the batch's first images they are for.
        gradients: by name of the layer's node, one for each random sum, shaped like the layer's output for them.
        by_image: names of the layers whose rows are of one image after the other.
    """

    images: int
    gradients: Mapping[str, Sequence[Tensor]]
    by_image: Collection[str]

    def sqnr_db(self, name: str, error: Tensor) -> float:
        """SQNR in dB of the model's outputs where a layer's output is off by ``error``, to first order.

        The outputs move by J·error. For signs v drawn at random, the mean of (v·J·error)² is the squared length of that
        (M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1990), and v·J is what one
        backward pass finds for all layers. Images are independent, so that each is a sample of its own.

        Args:
            error: of the layer's output, for the whole batch.
        """
        powers = []
        for gradient in self.gradients[name]:
            products = (gradient * error[: len(gradient)]).double()
            parts = self.images if name in self.by_image and len(gradient) % self.images == 0 else 1
            powers.append(float(products.reshape(parts, -1).sum(1).square().sum()))
        noise = sum(powers) / len(powers)
        return -10 * math.log10(noise) if noise else math.inf  # NaN stays NaN, as for a layer's own output


def reach(program: Program, layers: Sequence[Layer], batch: Sequence[Tensor]) -> Reach:
    """Run the float program forward once, and backward from random sums of its outputs.

    Args:
        program: with the layers' nodes in its graph; composites are computed by their parts, as they have no gradient.
        batch: its first images are used, all of them where the model does not take other numbers.

    Returns:
        With no gradients where an operator has no derivative, nor, where not all images are used, of layers whose rows
        are not known to be of the first images first.
    """
    per_image = sum(math.prod(shape(layer.tail)) for layer in layers) // len(program.example_inputs[0])
    images = max(1, min(IMAGES, ELEMENTS // max(1, per_image), len(batch[0])))
    if not program.dynamic_batch:
        images = len(batch[0])
    by_image = _by_image(layers, program, images)
    wanted = max(math.ceil(SAMPLES / images), 0 if len(by_image) == len(layers) else ROUNDS)
    rounds = max(1, min(wanted, ELEMENTS // max(1, per_image * images)))
    random = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        forward = _Forward(program.module, layers)
        found = forward.run(*(_differentiable(tensor[:images]) for tensor in batch))
        outputs = [each for each in pytree.tree_leaves(found) if isinstance(each, Tensor) and each.requires_grad]
        gradients: dict[str, list[Tensor]] = {name: [] for name in forward.values}
        for _ in range(rounds if outputs else 0):
            sums = [_signs(each, random) / each.detach().norm() for each in outputs]
            try:
                moved = torch.autograd.grad(
                    outputs, list(forward.values.values()), sums, retain_graph=True, materialize_grads=True
                )
            except RuntimeError:  # an operator has no derivative: nothing is known of what lies before it
                break
            for name, gradient in zip(forward.values, moved, strict=True):
                gradients[name].append(gradient)
    known = gradients.keys() if images == len(batch[0]) else gradients.keys() & by_image
    return Reach(images, {name: gradients[name] for name in known if gradients[name]}, by_image)


def _by_image(layers: Sequence[Layer], program: Program, images: int) -> set[str]:
    """The layers whose rows are of one image after the other.

    Where some layer has the images elsewhere than in its first dimension, as recurrent layers and PyTorch's attention
    have them, rows that several dimensions were joined in may be in either order.
    """
    if not program.dynamic_batch:
        return {layer.node.name for layer in layers if shape(layer.tail)[0] == images}
    sizes = {layer.node.name: dims(layer.tail) for layer in layers}
    elsewhere = any(isinstance(size, str) for each in sizes.values() for size in (each or ())[1:])
    return {
        name
        for name, each in sizes.items()
        if each and isinstance(each[0], str) and (each[0].isidentifier() or not elsewhere)
    }


class _Forward(fx.Interpreter):
    """Keeps what layers put out, with the graph that autograd makes behind it."""

    def __init__(self, module: fx.GraphModule, layers: Sequence[Layer]) -> None:
        super().__init__(module)
        self._names = {layer.tail: layer.node.name for layer in layers}
        self.values: dict[str, Tensor] = {}

    def run_node(self, node: fx.Node) -> Any:
        value: Any
        if is_call(node, *COMPOSITES):
            operands: Any = self.map_nodes_to_values(arguments(node), node)
            value = COMPOSITES[node.target].decomposition(*operands)  # type: ignore[index]
        else:
            value = super().run_node(node)
        if node.op == "get_attr" and isinstance(value, Tensor):
            value = value.clone() if value.is_inference() else value.detach()
        if node in self._names:
            if not value.requires_grad:  # of integers, which have no gradient
                value = value.detach().requires_grad_()
            self.values[self._names[node]] = value
        return value


def _differentiable(tensor: Tensor) -> Tensor:
    copied = tensor.clone()
    return copied.requires_grad_() if copied.is_floating_point() else copied


def _signs(like: Tensor, random: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=random) * 2 - 1).to(like)
