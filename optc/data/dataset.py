"""The dataset interface: named collections of images with fixed splits, served as model inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from optc.errors import DataError, UnknownNameError
from optc.paths import user_path
from optc.plugins.registry import blamed, registry

if TYPE_CHECKING:
    from torch import Tensor

    from optc.program import Preprocessing

SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)
SPLIT_SEED = 0
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2


class Split(ABC):
    """One split of a dataset under one model's preprocessing. Order is fixed and, but for given splits, shuffled.

    Attributes:
        dataset: name of the dataset it is of.
        name: ``"train"``, ``"validation"`` or ``"test"``.
    """

    def __init__(self, dataset: str, name: SplitName) -> None:
        self.dataset = dataset
        self.name = name

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @property
    @abstractmethod
    def labels(self) -> Sequence[int] | None:
        """One class index per image, in the order of :meth:`batches`; ``None`` where images are unlabeled."""

    @property
    @abstractmethod
    def content_hash(self) -> str:
        """What pins the images and labels down, such as ``"sha256:0123456789abcdef"``."""

    @property
    def description(self) -> str:
        """One line for reports and manifests: dataset, split, number of images and content hash."""
        return f"{self.dataset} {self.name}, {len(self)} images, {self.content_hash}"

    @abstractmethod
    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield (images, labels): NCHW float32 normalised as the model wants, and int64 class indices or ``None``.

        Args:
            batch_size: images per batch; the last batch may be smaller.
            limit: stop after this many images.

        Raises:
            DataError: an image cannot be decoded; names the file.
        """

    def spans(self, batch_size: int, limit: int | None) -> Iterator[slice]:
        """The index range of each batch of :meth:`batches`."""
        count = len(self) if limit is None else min(limit, len(self))
        for start in range(0, count, batch_size):
            yield slice(start, min(start + batch_size, count))


class Dataset(ABC):
    """A named collection of images. Subclasses set ``name`` and ``summary`` and write :meth:`split`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    origin: str = "this module"

    @property
    def label(self) -> str:
        """What messages and manifests call this dataset: its name, or the folder it came from."""
        return self.name

    @property
    @abstractmethod
    def num_classes(self) -> int | None:
        """Number of classes the labels count, or ``None`` if the images are unlabeled."""

    @property
    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names by class index; empty if the images are unlabeled or their names unknown."""

    @abstractmethod
    def split(self, name: SplitName, preprocessing: Preprocessing) -> Split:
        """One split, with images prepared as ``preprocessing`` says.

        Raises:
            DataError: the dataset has no such split.
        """

    def check_classes(self, outputs: int) -> None:
        """Make sure labels index a classifier with ``outputs`` outputs.

        Raises:
            DataError: the numbers differ.
        """
        if self.num_classes is not None and self.num_classes != outputs:
            raise DataError(
                f"dataset '{self.label}' has {self.num_classes} classes but the model has {outputs} outputs",
                "use a model trained on this dataset (--weights PATH) or another dataset",
            )


def named_split(dataset: Dataset, name: SplitName, preprocessing: Preprocessing) -> Split:
    """One split of a dataset, as :meth:`Dataset.split`; what its plugin raises by mistake, at any time, names it.

    Raises:
        DataError: the dataset has no such split.
        PluginError: the dataset raised something else.
    """
    with _blamed(dataset):
        return _NamedSplit(dataset, dataset.split(name, preprocessing))


class _NamedSplit(Split):
    def __init__(self, dataset: Dataset, split: Split) -> None:
        super().__init__(split.dataset, split.name)
        self._dataset, self._split = dataset, split

    def __len__(self) -> int:
        with _blamed(self._dataset):
            return len(self._split)

    @property
    def labels(self) -> Sequence[int] | None:
        with _blamed(self._dataset):
            return self._split.labels

    @property
    def content_hash(self) -> str:
        with _blamed(self._dataset):
            return self._split.content_hash

    @property
    def description(self) -> str:
        with _blamed(self._dataset):
            return self._split.description

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        with _blamed(self._dataset):
            batches = iter(self._split.batches(batch_size, limit))
        while True:
            with _blamed(self._dataset):  # not while the caller has the batch, whose errors are its own
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _blamed(dataset: Dataset) -> AbstractContextManager[None]:
    return blamed("dataset", dataset.name, dataset.origin)


def check_split_name(name: str) -> None:
    """Refuse anything but the three split names.

    Raises:
        DataError: ``name`` is not one of them.
    """
    if name not in SPLIT_NAMES:
        raise DataError(f"unknown split '{name}'", f"splits are {', '.join(SPLIT_NAMES)}")


def stratified_split(labels: NDArray[np.int64], seed: int = SPLIT_SEED) -> dict[SplitName, NDArray[np.int64]]:
    """Split indices 0…N-1 into disjoint train (70 %), validation (10 %) and test (20 %), class by class.

    Each class is shuffled by ``seed`` and cut in the same proportions, shares rounded to whole images; a class gives at
    least one image to train, and of three or more one to validation. The order within each split is shuffled too, so
    any prefix mixes the classes.

    Args:
        labels: shape (N,), class index of each image; all zero for unlabeled images.
    """
    generator = np.random.default_rng(seed)
    parts: dict[SplitName, list[NDArray[np.int64]]] = {name: [] for name in SPLIT_NAMES}
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        test = min(round(TEST_SHARE * len(members)), len(members) - 1)
        least = 1 if len(members) > 2 else 0
        validation = min(max(least, round(VALIDATION_SHARE * len(members))), len(members) - 1 - test)
        parts["test"].append(members[:test])
        parts["validation"].append(members[test : test + validation])
        parts["train"].append(members[test + validation :])
    return {name: generator.permutation(np.concatenate(part)) for name, part in parts.items()}


def open_dataset(spec: str) -> Dataset:
    """The registered dataset of that name, or else the folder of images at that path.

    Raises:
        UnknownNameError: neither; suggests the closest names.
        DataError: the folder has no images.
        PluginError: the dataset raised something else.
    """
    from optc.data.folder import FolderDataset

    table = registry().all("dataset")
    if spec in table:
        dataset: Dataset = registry().make("dataset", spec)
        return dataset
    path = user_path(spec)
    if spec and path.is_dir():
        return FolderDataset(path)
    raise UnknownNameError("dataset", spec, table, f"give {', '.join(table)}, or a folder of images that exists")
