"""Calibration batches come from the training split only."""

from __future__ import annotations

import pytest
import torch

from optc.data.calibration import DatasetCalibration
from optc.data.digits import DigitsDataset
from optc.errors import DataError
from optc.program import Preprocessing

SMALL = Preprocessing(input_size=(3, 8, 8))


def test_gives_the_first_batches_of_train_each_time_anew() -> None:
    split = DigitsDataset().split("train", SMALL)
    calibration = DatasetCalibration(split, batch_size=16, batches=3)
    expected = [images for images, _ in split.batches(16, limit=48)]
    for _ in range(2):
        batches = list(calibration)
        assert len(batches) == len(calibration) == 3
        assert all(torch.equal(batch, images) for (batch,), images in zip(batches, expected, strict=True))
    assert split.description in calibration.description
    assert "48" in calibration.description


def test_more_than_there_is_gives_all() -> None:
    calibration = DatasetCalibration(DigitsDataset().split("train", SMALL), batch_size=500, batches=9)
    assert [len(batch) for (batch,) in calibration] == [500, 500, 259]
    assert len(calibration) == 3


@pytest.mark.parametrize("name", ["validation", "test"])
def test_other_splits_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} split of 'digits'"):
        DatasetCalibration(DigitsDataset().split(name, SMALL), 8, 1)  # type: ignore[arg-type]
