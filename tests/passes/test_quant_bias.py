"""Bias correction: what rounding adds to a layer's mean is taken off its bias."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import optc
from optc_passes.observers import ActivationObserver
from optc_passes.quant import Quant
from optc_passes.quant_bias import mean_shift
from optc_passes.quant_blocks import BlockFormat, dequantized, round_blocks
from optc_passes.quant_formats import LayerFormats


class Batches:
    description = "test batches"

    def __init__(self, *batches: torch.Tensor) -> None:
        self._batches = batches

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter([(batch,) for batch in self._batches])


@pytest.mark.parametrize("groups", [1, 4])
def test_the_shift_is_the_mean_of_what_the_error_adds(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups)
    x, error = torch.rand(4, 8, 9, 9), 0.01 * torch.randn_like(conv.weight)
    node = next(n for n in optc.capture(conv, (x,)).graph.nodes if n.op == "call_function")
    with torch.no_grad():
        before = conv(x).mean((0, 2, 3))
        conv.weight += error
        after = conv(x).mean((0, 2, 3))
        torch.testing.assert_close(mean_shift(node, x, error), after - before)


def test_weights_in_blocks_keep_the_means_of_their_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Linear(128, 16)
    x = torch.rand(64, 128) + 1.0
    program = optc.capture(model, (x[:2],))
    result = Quant(formats="int4-weights")(program, optc.PassContext(calibration=Batches(x)))
    with torch.no_grad():
        wanted = model(x).mean(0)
        plain = x @ dequantized(*round_blocks(model.weight, BlockFormat(4))).T + model.bias
    moved = (result.program.run(x)[0].mean(0) - wanted).abs().max()
    assert moved < 1e-5
    assert (plain.mean(0) - wanted).abs().max() > 1e-3
    assert torch.equal(dict(program.constants())["bias"], model.bias)


def test_static_int8_takes_the_correction_only_if_it_helps() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    batch = torch.rand(256, 64) + 2.0
    program = optc.capture(model, (batch[:2],))
    context = optc.PassContext(calibration=Batches(batch))
    layers = LayerFormats(program, context, ActivationObserver)
    layers.calibrate(context)
    formats = dict.fromkeys(layers.names, "int8")
    layers.noise(dict.fromkeys(layers.names, ("int8",)))
    plain = layers.attempt(formats)
    layers.corrects_bias = True
    corrected = layers.attempt(formats).sqnr
    assert corrected != plain.sqnr
    assert layers.with_better_bias(formats, plain).sqnr == max(corrected, plain.sqnr)
    assert layers.corrects_bias is (corrected > plain.sqnr)
    best = replace(plain, sqnr=math.inf)
    assert layers.with_better_bias(formats, best) is best
    assert not layers.corrects_bias
