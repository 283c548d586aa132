"""Calibration batches from a dataset's training split, never from what is evaluated."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from optc.data.dataset import Split
from optc.errors import DataError


class DatasetCalibration:
    """The first ``batches`` batches of a training split, as an :class:`optc.Calibration`.

    Raises:
        DataError: the split is not a training split.
    """

    def __init__(self, split: Split, batch_size: int, batches: int) -> None:
        if split.name != "train":
            raise DataError(f"calibration on the {split.name} split of '{split.dataset}'", "use the train split")
        self._split = split
        self._batch_size = batch_size
        self._images = min(len(split), batch_size * batches)

    @property
    def description(self) -> str:
        return f"first {self._images} of {self._split.description}"

    def __len__(self) -> int:
        return -(-self._images // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for images, _ in self._split.batches(self._batch_size, limit=self._images):
            yield (images,)
