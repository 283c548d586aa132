"""The digits: real images, in fixed splits, as a model wants them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from optc.data.dataset import SPLIT_NAMES
from optc.data.digits import DigitsDataset
from optc.program import Preprocessing

PLAIN = Preprocessing(input_size=(1, 8, 8), mean=(0.0,), std=(1.0,))


def test_splits_hold_every_image_once_with_its_label() -> None:
    bunch = load_digits()
    expected = sorted((image.tobytes(), int(label)) for image, label in zip(bunch.images, bunch.target, strict=True))
    found = []
    for name in SPLIT_NAMES:
        for images, labels in DigitsDataset().split(name, PLAIN).batches(100):
            assert labels is not None
            pixels = (images[:, 0] * 16).round().double().numpy()
            found += [(np.ascontiguousarray(p).tobytes(), int(y)) for p, y in zip(pixels, labels, strict=True)]
    assert sorted(found) == expected


def test_description_pins_the_split_down() -> None:
    splits = {name: DigitsDataset().split(name, PLAIN) for name in SPLIT_NAMES}
    assert {name: len(split) for name, split in splits.items()} == {"train": 1259, "validation": 179, "test": 359}
    assert splits["test"].description.startswith("digits test, 359 images, sha256:")
    assert len({split.content_hash for split in splits.values()}) == 3
    assert DigitsDataset().split("test", Preprocessing()).content_hash == splits["test"].content_hash


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_inputs_have_the_models_size_and_normalisation(interpolation: str) -> None:
    preprocessing = Preprocessing(input_size=(3, 40, 40), interpolation=interpolation)
    images, labels = next(DigitsDataset().split("validation", preprocessing).batches(7))
    assert (images.shape, images.dtype) == ((7, 3, 40, 40), torch.float32)
    assert labels is not None
    assert (labels.shape, labels.dtype) == ((7,), torch.int64)
    grey = images * torch.tensor(preprocessing.std).view(3, 1, 1) + torch.tensor(preprocessing.mean).view(3, 1, 1)
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    assert float(grey.min()) >= -1e-6
    assert float(grey.max()) <= 1 + 1e-6


def test_nearest_upscaling_repeats_pixels() -> None:
    split = DigitsDataset().split("test", replace(PLAIN, input_size=(1, 16, 16), interpolation="nearest"))
    big, _ = next(split.batches(5))
    small, _ = next(DigitsDataset().split("test", PLAIN).batches(5))
    torch.testing.assert_close(big, small.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_batches_end_with_the_split_or_at_the_limit() -> None:
    split = DigitsDataset().split("validation", PLAIN)
    assert [len(images) for images, _ in split.batches(100)] == [100, 79]
    assert [len(images) for images, _ in split.batches(16, limit=40)] == [16, 16, 8]
    assert split.labels is not None
    seen = torch.cat([labels for _, labels in split.batches(50) if labels is not None])
    assert seen.tolist() == list(split.labels)
