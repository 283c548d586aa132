"""Calibration batches from a dataset's training split, never from what is evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from optc.data.dataset import Split
from optc.errors import DataError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAST_IMAGES = 8
"""Fewer say little of a range: an activation's largest value keeps growing with every image."""


class DatasetCalibration:
    """The first ``batches`` batches of a training split, as an :class:`optc.Calibration`, in a model's type of floats.

    Raises:
        DataError: the split is not a training split; when iterated, it has fewer than :data:`LEAST_IMAGES` images.
    """

    def __init__(self, split: Split, batch_size: int, batches: int, dtype: torch.dtype | None = None) -> None:
        if split.name != "train":
            raise DataError(f"calibration on the {split.name} split of '{split.dataset}'", "use the train split")
        self._split, self._dtype = split, dtype
        self._batch_size = batch_size
        self._images = min(len(split), batch_size * batches)

    @property
    def description(self) -> str:
        return f"first {self._images} of {self._split.description}"

    def __len__(self) -> int:
        return -(-self._images // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self._images < LEAST_IMAGES:
            raise DataError(
                f"the training split of '{self._split.dataset}' has {self._images} images to calibrate on, fewer than"
                f" {LEAST_IMAGES}",
                "give more images, or leave --data away to calibrate on synthetic ones",
            )
        for images, _ in self._split.batches(self._batch_size, limit=self._images):
            yield (images if self._dtype is None else images.to(self._dtype),)
