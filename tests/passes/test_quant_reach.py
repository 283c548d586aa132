"""What a layer's noise does to the outputs: estimates beside what happens when the layer is quantized."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import optc
from optc.passmanager.manager import build_passes
from optc_passes.observers import ActivationObserver
from optc_passes.quant_account import noisiest
from optc_passes.quant_formats import LayerFormats
from optc_passes.quant_plan import make_plan
from optc_passes.quant_reach import IMAGES, reach
from tests.passes.test_quant_bias import Batches


class Funnel(nn.Module):
    """The first layer's noise is amplified, the second one's hardly reaches the output; both have the same noise."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 16)
        with torch.no_grad():
            self.quiet.weight.copy_(self.loud.weight)
            self.quiet.bias.copy_(self.loud.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loud, quiet = nn.functional.relu(self.loud(x)), nn.functional.relu(self.quiet(x))
        return self.last((loud + 0.01 * quiet).mean((2, 3)))


def layers_of(program: optc.Program, *images: torch.Tensor) -> LayerFormats:
    context = optc.PassContext(calibration=Batches(*images))
    layers = LayerFormats(program, context, ActivationObserver)
    layers.calibrate(context)
    return layers


@pytest.mark.parametrize("size", [1, 3, 16])
def test_noise_that_is_amplified_counts_more(size: int) -> None:
    """Whatever the size of calibration batches."""
    torch.manual_seed(1)
    x = torch.rand(16, 3, 12, 12)
    program = optc.capture(Funnel().eval(), (x[:1],))
    layers = layers_of(program, *x.split(size))
    own = layers.noise(dict.fromkeys(layers.names, ("int8",)), with_outputs=True)
    loud, quiet, _ = layers.names
    assert own[loud, "int8"] == pytest.approx(own[quiet, "int8"], abs=0.1)
    assert layers.output_noise[quiet, "int8"] == pytest.approx(layers.output_noise[loud, "int8"] + 40, abs=6)
    assert next(iter(noisiest(layers, own, optc.PassContext()))) != (quiet, "int8")


@pytest.mark.parametrize("corrects", [True, False], ids=["corrected bias", "plain bias"])
def test_estimates_are_near_what_is_seen_when_the_layer_is_quantized(corrects: bool) -> None:
    """On a network with composites (a residual, an activation in the convolution), within the estimator's spread."""
    from optc.frontend.load import load_model

    torch.manual_seed(0)
    model = load_model("test_efficientnet", weights="random").module
    images = torch.rand(16, 3, 64, 64)
    context = optc.PassContext(calibration=Batches(images))
    program = build_passes("fuse")(optc.capture(model, (images[:2],)), context).program
    layers = layers_of(program, images)
    layers.noise(dict.fromkeys(layers.names, ("int8",)), with_outputs=True)
    layers.corrects_bias = corrects
    estimates = layers.output_noise
    assert set(estimates) == {(name, "int8") for name in layers.names}
    seen = {name: layers.attempt({name: "int8"}).sqnr for name in layers.names}
    far = [estimates[name, "int8"] - seen[name] for name in layers.names]
    assert abs(sum(far) / len(far)) < 2
    assert max(map(abs, far)) < 8


def test_what_does_not_reach_the_outputs_makes_no_noise() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Linear(4, 4), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            a = self.a(x)
            return self.b(a.mean((2, 3))), (self.c(x) > 0).sum()

    x = torch.rand(20, 3, 4, 4)
    with torch.inference_mode():
        images = x.clone()
    program = optc.capture(Unused().eval(), (x[:2],))
    found = reach(program, make_plan(program).layers, [images])
    assert found.images == IMAGES
    (conv, linear, unused) = (layer.node.name for layer in make_plan(program).layers)
    error = 0.01 * torch.randn(20, 4, 4, 4)
    assert found.sqnr_db(conv, error) < 60
    assert found.sqnr_db(linear, error[:, :, 0, 0]) < 60
    assert unused not in found.gradients or found.sqnr_db(unused, error) == math.inf
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in program.module.parameters())


class TokensFirst(nn.Module):
    """As PyTorch's own attention lays its values out: the images second, and then both in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.a(x.transpose(0, 1)).relu()
        mixed = self.b(tokens.flatten(0, 1)).view(5, -1, 8)
        return self.c(mixed.mean(0))


@pytest.mark.parametrize("images", [10, 20])
def test_images_may_be_in_another_dimension_than_the_first(images: int) -> None:
    torch.manual_seed(0)
    x = torch.rand(images, 5, 6)
    program = optc.capture(TokensFirst().eval(), (x[:2],))
    plan = make_plan(program)
    found = reach(program, plan.layers, [x])
    a, b, c = (layer.node.name for layer in plan.layers)
    errors = {a: torch.randn(5, images, 8), b: torch.randn(5 * images, 8), c: torch.randn(images, 4)}
    assert found.gradients.keys() == ({a, b, c} if images <= IMAGES else {c})
    assert found.by_image == {c}
    for name in found.gradients:
        assert math.isfinite(found.sqnr_db(name, 0.01 * errors[name]))


def test_noise_of_images_in_bytes_is_estimated() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x.float() / 255).relu().mean((2, 3)))

    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    program = optc.capture(Bytes().eval(), (x[:2],))
    plan = make_plan(program)
    assert reach(program, plan.layers, [x]).gradients.keys() == {layer.node.name for layer in plan.layers}


def test_without_a_derivative_nothing_is_estimated_and_own_noise_decides() -> None:
    class Gamma(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.gammainc(self.a(x).abs() + 1, x.mean(1, keepdim=True) + 1).mean((2, 3))

    x = torch.rand(8, 3, 4, 4)
    program = optc.capture(Gamma().eval(), (x[:2],))
    assert reach(program, make_plan(program).layers, [x]).gradients == {}
    layers = layers_of(program, x)
    own = layers.noise(dict.fromkeys(layers.names, ("int8",)), with_outputs=True)
    assert layers.output_noise == {}
    assert list(noisiest(layers, own, optc.PassContext())) == list(own)
