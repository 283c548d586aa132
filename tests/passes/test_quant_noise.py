"""SQNR of outputs and of single layers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import optc
from optc import PassContext, Target
from optc_passes.observers import ActivationObserver
from optc_passes.quant_formats import LayerFormats
from optc_passes.quant_local import local_formats
from optc_passes.quant_noise import NoiseMeter, output_sqnr, sqnr_db
from optc_passes.quant_plan import make_plan
from optc_passes.quant_pt2e import prepare
from optc_passes.quantizer import Int8Kernels


def test_sqnr_is_the_ratio_of_powers_in_decibel() -> None:
    reference = torch.full((10,), 2.0)
    assert sqnr_db(reference, reference + 0.2) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
    assert math.isnan(sqnr_db(reference, reference * float("nan")))


def test_output_sqnr_is_that_of_the_worst_output() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 0.01, x * 1.1

    program = optc.capture(Two(), (torch.randn(2, 3),))
    batches = [(torch.ones(2, 3),), (torch.ones(2, 3),)]
    references = [(torch.ones(2, 3), torch.ones(2, 3))] * 2
    assert output_sqnr(program, batches, references) == pytest.approx(20, abs=1e-3)


def test_each_layer_is_measured_alone() -> None:
    """The second layer's input holds an outlier; the first and the last layer do not suffer from it."""

    class Outlier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(7, 4, 1), nn.Linear(32, 4)
            with torch.no_grad():
                self.b.weight[:, 4:] = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(torch.cat([nn.functional.gelu(self.a(x)), 1e5 * x], 1)))

    x = torch.randn(2, 3, 8, 32)
    program = optc.capture(Outlier(), (x,))
    work = program.fork()
    prepared, observers = prepare(work, make_plan(work), ActivationObserver, Int8Kernels())
    prepared(x)
    formats = {"conv2d": ("int8",), "conv2d_1": ("int8",), "linear": ("int8", "int8-weights", "int4-weights")}
    meter = NoiseMeter(program.module, make_plan(program), observers, formats, local_formats(128, 127))
    with torch.no_grad():
        meter.run(x)
    noise = meter.sqnr
    assert list(noise) == [(name, form) for name, forms in formats.items() for form in forms]
    assert noise["conv2d", "int8"] > 30
    assert noise["conv2d_1", "int8"] < 8
    assert noise["linear", "int8"] > 30
    assert noise["linear", "int8-weights"] > noise["linear", "int4-weights"] + 15


class Batches:
    description = "noise around 3"

    def __iter__(self):  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        return iter([(3 + torch.randn(16, 32),)])


@pytest.mark.parametrize("form", ["int8", "int8-dynamic", "bf16", "int8-weights", "int4-weights"])
def test_the_noise_of_a_layer_is_that_of_the_program_made(form: str) -> None:
    """Whether a format's bias is corrected included, which shows where the mean of the input is not 0."""
    torch.manual_seed(0)
    program = optc.capture(nn.Linear(32, 8), (torch.randn(2, 32),))
    context = PassContext(Target(threads=1), Batches())
    layers = LayerFormats(program, context, ActivationObserver)
    layers.calibrate(context)
    noise = layers.noise({"linear": (form,)})
    assert noise["linear", form] == pytest.approx(
        layers.attempt({"linear": form}).sqnr, abs=3 if form == "bf16" else 0.1
    )
