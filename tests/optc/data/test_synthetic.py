"""Synthetic images: seeded, distinct by split, with the spectrum of natural images."""

from __future__ import annotations

import torch

from optc.data.dataset import SPLIT_NAMES
from optc.data.synthetic import SyntheticDataset
from optc.program import Preprocessing

PLAIN = Preprocessing(input_size=(3, 128, 128), mean=(0.0,) * 3, std=(1.0,) * 3)


def images(name: str, count: int = 16) -> torch.Tensor:
    split = SyntheticDataset().split(name, PLAIN)  # type: ignore[arg-type]
    return torch.cat([batch for batch, _ in split.batches(8, limit=count)])


def test_seeded_and_distinct_by_split() -> None:
    drawn = [images(name) for name in SPLIT_NAMES]
    assert torch.equal(drawn[0], images("train"))
    assert len({tuple(x.flatten(1).sum(1).tolist()) for x in drawn}) == 3


def test_same_images_whatever_the_batch_size() -> None:
    split = SyntheticDataset().split("test", PLAIN)
    one_by_one = torch.cat([batch for batch, _ in split.batches(1, limit=5)])
    assert torch.equal(one_by_one, next(split.batches(5))[0])


def test_spectrum_falls_as_one_over_f_and_channels_agree() -> None:
    x = images("train", 32)
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    amplitude = torch.fft.rfft2(x - x.mean((2, 3), keepdim=True)).abs().mean((0, 1))
    row = amplitude[0, 2:40]
    slope = torch.linalg.lstsq(
        torch.stack([torch.arange(2, 40).float().log(), torch.ones(38)], 1), row.log()[:, None]
    ).solution[0]
    assert -1.3 < float(slope) < -0.7
    correlation = torch.corrcoef(torch.stack([x[:, 0].flatten(), x[:, 1].flatten()]))[0, 1]
    assert float(correlation) > 0.7


def test_it_says_that_it_is_synthetic() -> None:
    split = SyntheticDataset().split("train", PLAIN)
    assert split.labels is None
    assert split.description == "synthetic train, 256 images, 1/f noise, seed 1"
