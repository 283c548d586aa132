"""Calibration: what is read, what is refused, what is reported."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

import optc
from optc_passes.quant import Quant

X = torch.randn(8, 3, 8, 8)


class Data:
    description = "bad data"

    def __init__(self, *batches: tuple[torch.Tensor, ...]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def quantize(*batches: tuple[torch.Tensor, ...], model: nn.Module | None = None) -> optc.PassResult:
    program = optc.capture(model or nn.Conv2d(3, 4, 3), (X,))
    return Quant()(program, optc.PassContext(calibration=Data(*batches)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_with_nan_or_inf_is_named(bad: float) -> None:
    batch = X.clone()
    batch[0, 0, 0, 0] = bad
    with pytest.raises(optc.DataError, match="batch 2 of 'bad data' holds NaN or Inf"):
        quantize((X,), (batch,))


def test_no_batches() -> None:
    with pytest.raises(optc.DataError, match="'bad data' holds no samples, fewer than 8"):
        quantize()


def test_a_batch_for_another_model() -> None:
    with pytest.raises(optc.DataError, match="has 2 tensors, the model takes 1"):
        quantize((X, X))


def test_a_model_that_gives_nan() -> None:
    model = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        model.bias[0] = float("nan")
    expected = (
        r"the unquantized model's output holds NaN on calibration batch 1 of 'bad data' — check the model's weights"
    )
    with pytest.raises(optc.OptcError, match=expected):
        quantize((X,), model=model)


class Masked(nn.Module):
    """A second output with classes left out."""

    def __init__(self, out: float) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 8), out
        self.register_buffer("left_out", torch.tensor([True, False, False, False]))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.conv(x).flatten(1)
        return scores, scores.masked_fill(self.left_out, self.out)


def test_infinities_by_design_are_told_from_nan() -> None:
    with pytest.raises(optc.OptcError, match=r"output 1 of .* holds infinities on .*mask with a large finite number"):
        quantize((X,), model=Masked(-torch.inf))
    assert quantize((X,), model=Masked(-1e4)).applied


def test_no_calibration_says_what_to_give() -> None:
    with pytest.raises(optc.OptcError, match=r"needs calibration data .*calibration=.*int8-weights"):
        Quant()(optc.capture(nn.Conv2d(3, 4, 3), (X,)))


def test_calibration_that_is_not_needed_is_not_asked_for() -> None:
    result = Quant()(optc.capture(nn.ReLU(), (X,)))
    assert not result.modified


def test_progress_counts_batches(quantized: Callable) -> None:
    said: list[str] = []
    program = optc.capture(nn.Conv2d(3, 4, 3), (X,))
    Quant()(program, optc.PassContext(calibration=Data((X,), (X,)), progress=said.append))
    assert said == ["calibrating 1", "calibrating 2"]

    class Sized(Data):
        def __len__(self) -> int:
            return len(self.batches)

    Quant()(program, optc.PassContext(calibration=Sized((X,), (X,)), progress=said.append))
    assert said[2:] == ["calibrating 1/2", "calibrating 2/2"]


def test_torchao_says_nothing(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    with caplog.at_level(logging.WARNING):
        quantize((X,), model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
