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
    with pytest.raises(optc.OptcError, match=r"the unquantized model gives NaN or Inf .*check the model's weights"):
        quantize((X,), model=model)


def test_no_calibration_says_what_to_give() -> None:
    with pytest.raises(optc.OptcError, match=r"needs calibration data .*--data.*calibration="):
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
