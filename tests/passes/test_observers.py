"""Observers: the range each chooses, and that no scale is clamped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from optc_passes.observers import (
    ActivationObserver,
    EntropyObserver,
    HistogramRangeObserver,
    MseObserver,
    PercentileObserver,
    PerChannelWeightObserver,
)

ACTIVATION: dict[str, Any] = {"dtype": torch.uint8, "quant_min": 0, "quant_max": 255}
WEIGHT: dict[str, Any] = {
    "dtype": torch.int8,
    "quant_min": -127,
    "quant_max": 127,
    "qscheme": torch.per_channel_symmetric,
    "ch_axis": 0,
}
OBSERVERS = [ActivationObserver, PercentileObserver, EntropyObserver, MseObserver]


def fake(observer: ActivationObserver, x: Tensor) -> Tensor:
    scale, zero_point = observer.calculate_qparams()
    return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), 0, 255)


def test_minmax_covers_all_it_saw_and_zero() -> None:
    observer = ActivationObserver(**ACTIVATION)
    for x in (torch.tensor([1.0, 2.0]), torch.tensor([3.0])):
        assert observer(x) is x
    scale, zero_point = observer.calculate_qparams()
    assert float(scale) == pytest.approx(3 / 255)
    assert int(zero_point) == 0


@pytest.mark.parametrize(
    ("low", "high", "zero_point"), [(-1.1, 1.0, 128), (-1.0, 1.3, 128), (-1.0, 1.4, 106), (0.0, 1.0, 0)]
)
def test_a_range_that_is_nearly_symmetric_is_centred(low: float, high: float, zero_point: int) -> None:
    plain, centred = ActivationObserver(**ACTIVATION), ActivationObserver(**ACTIVATION, centre=True)
    x = torch.linspace(low, high, 1001)
    plain(x), centred(x)
    scale, chosen = centred.calculate_qparams()
    assert int(chosen) == zero_point
    assert float((fake(centred, x) - x).abs().max()) <= 0.501 * float(scale)
    assert float(plain.calculate_qparams()[0]) <= float(scale) <= 1.15 * float(plain.calculate_qparams()[0])


def test_what_is_symmetric_anyway_is_not_centred() -> None:
    symmetric = {**ACTIVATION, "dtype": torch.int8, "quant_min": -128, "quant_max": 127}
    observers = [ActivationObserver(**symmetric, qscheme=torch.per_tensor_symmetric, centre=c) for c in (False, True)]
    x = torch.tensor([-0.9, 1.0])
    assert len({float(observer.calculate_qparams()[0]) for observer in observers if observer(x) is x}) == 1


@pytest.mark.parametrize("cls", OBSERVERS)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e20])
def test_a_scale_is_as_small_or_large_as_the_data(cls: type[ActivationObserver], size: float) -> None:
    observer = cls(**ACTIVATION)
    x = torch.randn(20_000) * size
    observer(x)
    noise = (fake(observer, x) - x).double().square().sum() / x.double().square().sum()
    assert noise < 1e-3


@pytest.mark.parametrize("cls", OBSERVERS)
def test_all_zeros_give_a_usable_scale(cls: type[ActivationObserver]) -> None:
    observer = cls(**ACTIVATION)
    observer(torch.zeros(4, 3))
    observer(torch.zeros(0, 3))
    scale, zero_point = observer.calculate_qparams()
    assert float(scale) == 1.0
    assert int(zero_point) == 0


@pytest.mark.parametrize("cls", OBSERVERS)
def test_more_data_after_parameters_were_asked_for_counts(cls: type[ActivationObserver]) -> None:
    observer = cls(**ACTIVATION)
    observer(torch.rand(1000))
    before, _ = observer.calculate_qparams()
    observer(torch.rand(1000) * 100)
    after, _ = observer.calculate_qparams()
    assert float(after) > 10 * float(before)


def test_histograms_do_not_depend_on_the_order_of_batches() -> None:
    batches = [torch.randn(1000), torch.randn(1000) * 30, torch.zeros(10), torch.rand(500)]
    observers = [HistogramRangeObserver(**ACTIVATION) for _ in range(2)]
    for observer, order in zip(observers, (batches, batches[::-1]), strict=True):
        for batch in order:
            observer(batch)
        assert float(observer.counts.sum() + observer.zeros) == 2510
        assert float(observer.zeros) == 10
    # Bins differ in width by what came first, so compare the share of values within one unit of zero.
    inside = []
    for observer in observers:
        edges = torch.linspace(-observer.limit, observer.limit, observer.BINS + 1)[:-1]
        inside.append(float(observer.counts[edges.abs() < 1].sum()))
    assert inside[0] == pytest.approx(inside[1], rel=0.02)


def test_percentile_leaves_out_the_given_share() -> None:
    observer = PercentileObserver(percentile=90.0, **ACTIVATION)
    observer(torch.linspace(-10, 10, 100_001))
    low, high = observer.choose()
    assert float(low) == pytest.approx(-9, abs=0.02)
    assert float(high) == pytest.approx(9, abs=0.02)


def test_percentile_100_is_minmax() -> None:
    x = torch.randn(5000)
    percentile, minmax = PercentileObserver(percentile=100.0, **ACTIVATION), ActivationObserver(**ACTIVATION)
    percentile(x), minmax(x)
    torch.testing.assert_close(percentile.choose(), minmax.choose())


def test_percentile_counts_zeros() -> None:
    observer = PercentileObserver(percentile=90.0, **ACTIVATION)
    observer(torch.cat([torch.zeros(980), torch.full((20,), 5.0)]))
    assert float(observer.choose()[1]) < 0.01


def test_entropy_leaves_out_rare_outliers_and_keeps_a_uniform_range() -> None:
    outliers, uniform = EntropyObserver(**ACTIVATION), EntropyObserver(**ACTIVATION)
    outliers(torch.cat([torch.randn(200_000), torch.tensor([60.0, -60.0])]))
    uniform(torch.rand(200_000))
    assert float(outliers.choose()[1]) < 20
    assert float(uniform.choose()[1]) > 0.95


def test_weights_are_symmetric_per_channel() -> None:
    observer = PerChannelWeightObserver(**WEIGHT)
    weight = torch.tensor([[1.0, -2.0], [1e-9, 5e-10], [0.0, 0.0]])
    observer(weight)
    scale, zero_point = observer.calculate_qparams()
    torch.testing.assert_close(scale, torch.tensor([2 / 127, 1e-9 / 127, 1.0]))
    assert zero_point.tolist() == [0, 0, 0]


def test_a_weight_scale_leaves_room_for_the_bias() -> None:
    """A dead channel with a bias, and one whose bias is far larger than its products."""
    activation = ActivationObserver(**ACTIVATION)
    activation(torch.tensor([0.0, 1e-6]))
    observer = PerChannelWeightObserver(**WEIGHT)
    observer(torch.tensor([[0.0, 0.0], [1e-7, 0.0], [1.0, 1.0]]))
    bias = torch.tensor([1e3, 1.0, 1e-6])
    observer.layer = (activation, bias)
    scale = observer.calculate_qparams()[0] * activation.calculate_qparams()[0]
    steps = bias.double() / scale.double()
    assert float(steps.abs().max()) <= 2**30 * 1.001
    torch.testing.assert_close(steps.round() * scale.double(), bias.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "one outlier", "positive"])
def test_least_squared_error_is_no_worse_than_any_other_observer(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator)
    x = {"normal": x, "heavy tails": x**5, "positive": x.abs(), "one outlier": torch.cat([x, torch.tensor([80.0])])}[
        kind
    ]
    errors = {}
    for cls in OBSERVERS:
        observer = cls(**ACTIVATION)
        observer(x)
        errors[cls] = float((fake(observer, x) - x).double().square().mean())
    least = min(error for cls, error in errors.items() if cls is not MseObserver)
    assert errors[MseObserver] <= 1.02 * least  # the histogram's bins round by a little themselves
    if kind != "one outlier":
        assert errors[MseObserver] < 0.95 * errors[ActivationObserver]


def test_counts_go_beyond_what_float32_counts() -> None:
    observer = HistogramRangeObserver(**ACTIVATION)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        observer(torch.cat([torch.zeros(2**24 + 2**20), torch.ones(1000)]))
    finally:
        torch.set_num_threads(before)
    assert observer.zeros == 2**24 + 2**20
    assert observer.counts.min() == 0
    assert observer.counts.sum() == 1000


@pytest.mark.parametrize("cls", [MseObserver, EntropyObserver])
def test_what_is_symmetric_is_judged_by_the_levels_it_has(cls: type[EntropyObserver]) -> None:
    """Values of one sign have half of the levels there, so that clipping pays sooner."""
    symmetric = {"dtype": torch.int8, "quant_min": -128, "quant_max": 127, "qscheme": torch.per_tensor_symmetric}
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).relu() ** 2
    chosen = cls(**symmetric)
    chosen(x)
    (low, high), scale = chosen.choose(), chosen.calculate_qparams()[0]
    assert float(scale) == pytest.approx(max(-float(low), float(high)) / 127.5)
    reach = float(x.max())
    assert chosen._represented(float(chosen.min_val), reach) == (-reach, reach)
    if cls is MseObserver:
        errors = []
        for share in MseObserver.SHARES:
            step = float(x.max()) * share / 127.5
            rounded = torch.fake_quantize_per_tensor_affine(x, step, 0, -128, 127)
            errors.append(float((rounded - x).double().square().mean()))
        own = torch.fake_quantize_per_tensor_affine(x, float(scale), 0, -128, 127)
        assert float((own - x).double().square().mean()) <= 1.02 * min(errors)
