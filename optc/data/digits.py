"""scikit-learn's bundled handwritten digits: 1,797 real 8x8 grey images (the test part of UCI's Optdigits).

E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998,
doi:10.24432/C50P49. The data ships inside scikit-learn, so it needs no network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optc.data.dataset import Dataset, Split, SplitName, check_split_name, stratified_split
from optc.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from optc.program import Preprocessing


@cache
def _load() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images of shape (1797, 8, 8) in [0, 1] and labels of shape (1797,)."""
    # Read from scikit-learn's files, as load_digits does: importing scikit-learn and SciPy takes most of a second.
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("the digits come with scikit-learn, which is not installed", "pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return (table[:, :-1].reshape(-1, 8, 8) / 16.0).astype(np.float32), table[:, -1].astype(np.int64)


class DigitsDataset(Dataset):
    """Handwritten digits 0 to 9; split 70/10/20 by a fixed seed, stratified by class."""

    name = "digits"
    summary = "scikit-learn's bundled handwritten digits: 1797 real 8x8 images, 10 classes, no download"
    num_classes = 10
    class_names = tuple("0123456789")

    def split(self, name: SplitName, preprocessing: Preprocessing) -> Split:
        check_split_name(name)
        images, labels = _load()
        indices = stratified_split(labels)[name]
        return _DigitsSplit(name, images[indices], labels[indices], preprocessing)


class _DigitsSplit(Split):
    def __init__(
        self,
        name: SplitName,
        images: NDArray[np.float32],
        labels: NDArray[np.int64],
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__(DigitsDataset.name, name)
        self._images, self._labels, self._preprocessing = images, labels, preprocessing

    def __len__(self) -> int:
        return len(self._images)

    @property
    def labels(self) -> Sequence[int]:
        return [int(label) for label in self._labels]

    @property
    def content_hash(self) -> str:
        digest = hashlib.sha256(self._images.tobytes())
        digest.update(self._labels.tobytes())
        return f"sha256:{digest.hexdigest()[:16]}"

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        import torch

        from optc.data.preprocess import upscale_grey

        for span in self.spans(batch_size, limit):
            yield upscale_grey(self._images[span], self._preprocessing), torch.from_numpy(self._labels[span].copy())
