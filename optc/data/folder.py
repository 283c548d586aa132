"""Folders of images as datasets: one subfolder per class, or just images."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from optc.data.dataset import SPLIT_SEED, Dataset, Split, SplitName, check_split_name, stratified_split
from optc.errors import DataError
from optc.threads import available_threads

if TYPE_CHECKING:
    from torch import Tensor

    from optc.program import Preprocessing

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What is decoded, whatever a file is called: Pillow hands EPS to Ghostscript, which executes it."""
_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"})
_SPLIT_FOLDERS: dict[str, SplitName] = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""What folders of splits are called, in any case and with or without ``_set`` behind."""
_HASHED_BYTES = 1 << 30
"""Reading more than this only to hash it would take long: then the hash covers names and sizes."""
_Image = tuple[Path, str]
"""A file and the name of its class, ``""`` if it has none."""


class FolderDataset(Dataset):
    """Images under a folder, split as its subfolders say or else by a fixed seed.

    ``root/CLASS/*.jpg`` is labeled; ``root/*.jpg`` is not. ``root/train``, ``root/validation`` (or ``val``) and
    ``root/test`` hold such folders each (``Training``, ``test_set`` and the like are understood). Where one of the
    latter two is given, it is the test split, and validation is cut from ``train``; without ``train`` it is both.
    ``root/train`` alone is split by the seed. If every class is named by an ImageNet-1k synset (``n01440764``), labels
    are ImageNet's. Links are followed; what begins with a dot is hidden.

    Raises:
        DataError: there is no such folder, one in it cannot be read, or there is no image in it.
    """

    name = "folder"
    summary = (
        "a folder of images: one subfolder per class (under train, val and test, or split by a seed), or images only"
    )

    def __init__(self, root: Path) -> None:
        self._root = root
        if not root.is_dir():
            raise DataError(f"dataset folder '{root}' does not exist")
        try:
            self._parts = self._find_parts()
        except OSError as error:
            raise DataError(
                f"folder '{error.filename}' cannot be read: {error.strerror}", "change its permissions, or move it away"
            ) from error
        if not any(self._parts.values()):
            raise DataError(
                f"dataset folder '{root}' has no images",
                f"put them into one subfolder per class; known endings: {', '.join(sorted(_SUFFIXES))}",
            )
        classes = {class_ for files in self._parts.values() for _, class_ in files}
        if "" in classes and len(classes) > 1:
            raise DataError(
                f"dataset folder '{root}' mixes class folders with loose images", "move the loose images away"
            )
        self._classes = tuple(sorted(classes - {""}))

    @property
    def label(self) -> str:
        return str(self._root)

    @cached_property
    def _imagenet(self) -> dict[str, int] | None:
        """Each class's index in ImageNet-1k, if all are named by its synsets."""
        if not self._classes or not all(len(c) == 9 and c[0] == "n" and c[1:].isdigit() for c in self._classes):
            return None
        indices = _imagenet_synsets()
        return indices if indices.keys() >= set(self._classes) else None

    @property
    def num_classes(self) -> int | None:
        if not self._classes:
            return None
        return len(self._imagenet) if self._imagenet else len(self._classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self._imagenet) if self._imagenet else self._classes

    def split(self, name: SplitName, preprocessing: Preprocessing) -> Split:
        check_split_name(name)
        files = self._files(name)
        if not files:
            raise DataError(f"dataset folder '{self._root}' has no {name} images", f"add some, or a {name} subfolder")
        labels = None
        if self._classes:
            index = self._imagenet or {class_: i for i, class_ in enumerate(self._classes)}
            labels = np.array([index[class_] for _, class_ in files], np.int64)
        return _FolderSplit(self._root, name, [file for file, _ in files], labels, preprocessing)

    def _find_parts(self) -> dict[SplitName | None, list[_Image]]:
        """Images by the split they are given for, or all under ``None`` if the folder gives no splits."""
        subfolders = [path for path in sorted(self._root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        given = [path for path in subfolders if _split_of(path)]
        others = [path for path in subfolders if path not in given and _images(path)]
        if given and not others:
            parts: dict[SplitName | None, list[_Image]] = {}
            for path in given:
                if _split_of(path) in parts:
                    both = " and ".join(f"'{each.name}'" for each in given if _split_of(each) == _split_of(path))
                    raise DataError(f"dataset folder '{self._root}' has both {both}", "move one of them away")
                parts[_split_of(path)] = _images(path)
            if "train" in parts and "test" not in parts and "validation" in parts:
                parts["test"] = parts.pop("validation")
            return {None: parts["train"]} if parts.keys() == {"train"} else parts
        if any(class_ for path in given for _, class_ in _images(path)):
            raise DataError(
                f"dataset folder '{self._root}' has '{others[0].name}' beside '{given[0].name}', which is a split",
                "leave nothing but train, val and test there, or name the class otherwise",
            )
        return {None: _images(self._root)}

    def _files(self, name: SplitName) -> list[_Image]:
        parts = self._parts
        if None in parts:
            return _cut(parts[None], name)
        if name == "test" and "test" not in parts:
            name = "validation"
        if "validation" in parts or name == "test":
            # In the folder's order the first batches would be of one class only.
            files = parts.get(name, [])
            return [files[index] for index in np.random.default_rng(SPLIT_SEED).permutation(len(files))]
        # No validation images were given: two tenths of train serve, and train keeps the rest.
        train = parts.get("train", [])
        if name == "validation":
            return _cut(train, "test")
        return [*_cut(train, "train"), *_cut(train, "validation")]


class _FolderSplit(Split):
    def __init__(
        self,
        root: Path,
        name: SplitName,
        files: list[Path],
        labels: NDArray[np.int64] | None,
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__(str(root), name)
        self._root, self._files, self._labels, self._preprocessing = root, files, labels, preprocessing

    def __len__(self) -> int:
        return len(self._files)

    @property
    def labels(self) -> Sequence[int] | None:
        return None if self._labels is None else [int(label) for label in self._labels]

    @cached_property
    def _hash(self) -> str:
        sizes = [file.stat().st_size for file in self._files]
        whole = sum(sizes) <= _HASHED_BYTES
        digest = hashlib.sha256()
        for file, size in zip(self._files, sizes, strict=True):
            digest.update(os.fsencode(f"{file.relative_to(self._root).as_posix()} {size}\n"))
            if whole:
                digest.update(file.read_bytes())
        return f"{'' if whole else 'names and sizes '}sha256:{digest.hexdigest()[:16]}"

    @property
    def content_hash(self) -> str:
        return self._hash

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        import torch

        from optc.data.preprocess import normalize_bytes

        with ThreadPoolExecutor(available_threads()) as pool:
            for span in self.spans(batch_size, limit):
                pixels = np.stack(list(pool.map(self._read, self._files[span])))
                labels = None if self._labels is None else torch.from_numpy(self._labels[span].copy())
                yield normalize_bytes(pixels, self._preprocessing), labels

    def _read(self, file: Path) -> NDArray[np.uint8]:
        from optc.data.preprocess import prepare_image

        try:
            with Image.open(file, formats=_FORMATS) as image:
                return prepare_image(image, self._preprocessing)
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"image '{file}' cannot be read: {error}", "mend or remove it") from error


def _images(folder: Path) -> list[_Image]:
    """Image files in a folder and its subfolders, sorted, each with the subfolder (class) it lies in, or ``""``."""
    return [(file, "" if file.parent == folder else file.relative_to(folder).parts[0]) for file in _walk(folder)]


def _walk(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Image files in a folder and below; a link back to a folder that it is in (one of ``above``) is not followed.

    Unlike ``Path.rglob`` it follows links to folders and raises on folders that cannot be read.
    """
    real = folder.resolve()
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path, (*above, real))
        elif path.suffix.lower() in _SUFFIXES and path.is_file():
            yield path


def _cut(files: list[_Image], name: SplitName) -> list[_Image]:
    """The part of ``files`` that a fixed seed gives to a split, class by class."""
    if not files:
        return []
    classes = np.unique([class_ for _, class_ in files], return_inverse=True)[1].astype(np.int64)
    return [files[index] for index in stratified_split(classes)[name]]


@cache
def _imagenet_synsets() -> dict[str, int]:
    """Class index by synset id, in ImageNet-1k's order."""
    from optc.torchvision_ops import declare_torchvision_ops

    declare_torchvision_ops()
    from timm.data import ImageNetInfo

    return {name: index for index, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}


def _split_of(folder: Path) -> SplitName | None:
    """The split that a folder's name stands for."""
    return _SPLIT_FOLDERS.get(re.sub(r"[_-]?set$", "", folder.name.lower()))
