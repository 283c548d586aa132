"""GPTQ: rounding that keeps a layer's outputs on data like calibration's, not its weights."""

from __future__ import annotations

import pytest
import torch

from optc_passes.quant_blocks import BlockFormat, dequantized, round_blocks
from optc_passes.quant_gptq import enough_samples, round_gptq


def _correlated(samples: int, features: int, generator: torch.Generator) -> torch.Tensor:
    mix = torch.randn(features, features, generator=torch.Generator().manual_seed(9)) / features**0.5
    spectrum = torch.linspace(3, 0.05, features)
    return torch.randn(samples, features, generator=generator) * spectrum @ mix


@pytest.mark.parametrize(("bits", "least"), [(4, 1.3), (8, 1.3)])
def test_outputs_on_unseen_data_are_closer_than_with_nearest_rounding(bits: int, least: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=generator)
    seen, unseen = (_correlated(1024, 256, generator) for _ in range(2))
    form = BlockFormat(bits)
    integers, scales = round_gptq(weight, seen, form)
    low, high = form.limits
    assert integers.dtype == torch.int8
    assert integers.min() >= low
    assert integers.max() <= high
    assert scales.shape == (48, 2)
    wanted = unseen @ weight.T
    near, best = (
        float((unseen @ dequantized(*rounded).T - wanted).norm())
        for rounded in (round_blocks(weight, form), (integers, scales))
    )
    assert near > least * best


def test_features_that_are_never_seen_do_not_matter() -> None:
    weight, inputs = torch.randn(8, 64), torch.randn(256, 64)
    inputs[:, 5] = 0
    integers, scales = round_gptq(weight, inputs, BlockFormat(4))
    assert torch.isfinite(dequantized(integers, scales)).all()
    assert (dequantized(integers, scales) - weight).abs().max() < weight.abs().max()


def test_it_needs_as_many_samples_as_features() -> None:
    assert enough_samples(torch.zeros(2, 32, 64))
    assert not enough_samples(torch.zeros(2, 16, 64))
