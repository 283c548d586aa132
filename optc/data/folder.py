"""Datasets in folders: class subfolders of images, a flat folder of unlabeled ones, or splits given as subfolders."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from optc.data.dataset import Dataset, Split, SplitName, check_split_name, stratified_split
from optc.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from optc.program import Preprocessing

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
SPLIT_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "val"),
    "test": ("test",),
}


class FolderDataset(Dataset):
    """Images in a folder.

    ``FOLDER/CLASS/*.jpg`` is labelled, ``FOLDER/*.jpg`` is not. Either may stand under ``train``, ``validation`` (or
    ``val``) and ``test``; without those, or where one is missing, a split is cut from the rest by a fixed seed.

    Raises:
        DataError: there is no such folder, or no image in it.
    """

    name = "folder"
    summary = "a folder of images: one subfolder per class, or unlabeled; train/validation/test subfolders optional"

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"there is no folder '{folder}'", "give --data digits or a folder of images")
        self._folder = folder
        roots = {split: self._split_folder(split) for split in SPLIT_FOLDERS}
        given = {split: root for split, root in roots.items() if root is not None}
        classes = {path.name for root in given.values() or [folder] for path in _class_folders(root)}
        self._classes = tuple(sorted(classes))
        self._files = self._find(given)

    @property
    def label(self) -> str:
        return str(self._folder)

    @property
    def num_classes(self) -> int | None:
        return len(self._classes) or None

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._classes

    def split(self, name: SplitName, preprocessing: Preprocessing) -> Split:
        check_split_name(name)
        files = self._files[name]
        if not files:
            raise DataError(f"'{self._folder}' has no images for its {name} split", "add images or another subfolder")
        labels = [self._classes.index(path.parent.name) for path in files] if self._classes else None
        return _FolderSplit(self.label, name, files, labels, preprocessing)

    def _split_folder(self, split: SplitName) -> Path | None:
        return next((self._folder / name for name in SPLIT_FOLDERS[split] if (self._folder / name).is_dir()), None)

    def _find(self, given: dict[SplitName, Path]) -> dict[SplitName, list[Path]]:
        """Files of each split: as given, the missing ones cut from the training images."""
        found = {split: _images(root, bool(self._classes)) for split, root in given.items()}
        pool = found.pop("train", None) if given else _images(self._folder, bool(self._classes))
        if not pool and not any(found.values()):
            raise DataError(f"'{self._folder}' has no images", f"known endings: {', '.join(sorted(SUFFIXES))}")
        pool = pool or []
        names = [path.parent.name for path in pool] if self._classes else [""] * len(pool)
        cut = stratified_split(np.unique(names, return_inverse=True)[1].astype(np.int64)) if pool else {}
        files: dict[SplitName, list[Path]] = {"train": [], "validation": [], "test": []}
        for split in files:
            if split in found:
                files[split] = found[split]
        for split, indices in cut.items():
            home: SplitName = "train" if split in found else split
            files[home] += [pool[index] for index in indices]
        return files


class _FolderSplit(Split):
    def __init__(
        self, dataset: str, name: SplitName, files: list[Path], labels: list[int] | None, preprocessing: Preprocessing
    ) -> None:
        super().__init__(dataset, name)
        self._files, self._labels, self._preprocessing = files, labels, preprocessing

    def __len__(self) -> int:
        return len(self._files)

    @property
    def labels(self) -> Sequence[int] | None:
        return self._labels

    @property
    def content_hash(self) -> str:
        """Of names and sizes: reading every image of a large folder only to name it would take minutes."""
        digest = hashlib.sha256()
        for path in self._files:
            digest.update(f"{path.parent.name}/{path.name} {path.stat().st_size}\n".encode())
        return f"sha256 of names and sizes:{digest.hexdigest()[:16]}"

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        import torch

        from optc.data.preprocess import normalize_bytes, prepare_image

        for span in self.spans(batch_size, limit):
            pixels = np.stack([prepare_image(_open(path), self._preprocessing) for path in self._files[span]])
            labels = None if self._labels is None else torch.tensor(self._labels[span], dtype=torch.int64)
            yield normalize_bytes(pixels, self._preprocessing), labels


def _class_folders(root: Path) -> list[Path]:
    """Subfolders that hold images."""
    return [
        path for path in sorted(root.iterdir()) if path.is_dir() and any(_is_image(file) for file in path.iterdir())
    ]


def _images(root: Path, labelled: bool) -> list[Path]:
    folders = _class_folders(root) if labelled else [root]
    return [file for folder in folders for file in sorted(folder.iterdir()) if _is_image(file)]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot decode image {path}: {error}", "remove or replace it") from error
    return image
