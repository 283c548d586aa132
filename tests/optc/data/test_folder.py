"""Folders of real image files: layouts, splits, unreadable files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from optc.data.dataset import SPLIT_NAMES, Split
from optc.data.folder import FolderDataset
from optc.errors import DataError
from optc.program import Preprocessing

SMALL = Preprocessing(input_size=(3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3, resize=16)
COLOURS = {"apple": (200, 10, 10), "leaf": (10, 200, 10), "sky": (10, 10, 200)}


def write_class(folder: Path, name: str, count: int, suffix: str = ".png") -> None:
    (folder / name).mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (20 + index, 18), COLOURS.get(name, (50, 50, 50))).save(folder / name / f"{index}{suffix}")


def colours_match_labels(split: Split) -> bool:
    for images, labels in split.batches(4):
        assert labels is not None
        if not torch.equal(images.mean((2, 3)).argmax(1), labels):
            return False
    return True


def files_of(split: Split) -> set[Path]:
    return set(split._files)  # type: ignore[attr-defined]


def test_class_folders_are_split_by_seed_with_right_labels(tmp_path: Path) -> None:
    for name in COLOURS:
        write_class(tmp_path, name, 10)
    dataset = FolderDataset(tmp_path)
    assert (dataset.num_classes, dataset.class_names) == (3, ("apple", "leaf", "sky"))
    splits = [dataset.split(name, SMALL) for name in SPLIT_NAMES]
    assert [len(split) for split in splits] == [21, 3, 6]
    assert len(set.union(*map(files_of, splits))) == 30
    assert all(map(colours_match_labels, splits))
    assert files_of(FolderDataset(tmp_path).split("test", SMALL)) == files_of(splits[2])


def test_given_splits_are_kept_and_mixed(tmp_path: Path) -> None:
    for part, count in (("train", 8), ("val", 3), ("test", 2)):
        for name in COLOURS:
            write_class(tmp_path / part, name, count, ".jpg")
    dataset = FolderDataset(tmp_path)
    for name, part, count in (("train", "train", 24), ("validation", "val", 9), ("test", "test", 6)):
        split = dataset.split(name, SMALL)  # type: ignore[arg-type]
        assert len(split) == count
        assert {file.relative_to(tmp_path).parts[0] for file in files_of(split)} == {part}
        assert colours_match_labels(split)
    first_batch = next(dataset.split("train", SMALL).batches(8))[1]
    assert first_batch is not None
    assert len(set(first_batch.tolist())) > 1


@pytest.mark.parametrize("given", ["val", "test"])
def test_one_split_beside_train_is_the_test_split(given: str, tmp_path: Path) -> None:
    write_class(tmp_path / "train", "apple", 10)
    write_class(tmp_path / given, "apple", 4)
    (tmp_path / "notes").mkdir()
    dataset = FolderDataset(tmp_path)
    splits = [files_of(dataset.split(name, SMALL)) for name in SPLIT_NAMES]
    assert [len(split) for split in splits] == [8, 2, 4]
    assert len(set.union(*splits)) == 14


def test_without_train_the_other_split_is_both(tmp_path: Path) -> None:
    write_class(tmp_path / "val", "apple", 5)
    dataset = FolderDataset(tmp_path)
    assert files_of(dataset.split("test", SMALL)) == files_of(dataset.split("validation", SMALL))


def test_train_alone_is_split_by_the_seed(tmp_path: Path) -> None:
    for name in COLOURS:
        write_class(tmp_path / "train", name, 10)
    dataset = FolderDataset(tmp_path)
    splits = [dataset.split(name, SMALL) for name in SPLIT_NAMES]
    assert [len(split) for split in splits] == [21, 3, 6]
    assert len(set.union(*map(files_of, splits))) == 30
    assert all(map(colours_match_labels, splits))


def test_hidden_folders_are_no_classes_and_links_to_folders_are(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("apple", ".cache", "apple/.thumbnails"):
        write_class(root, name, 2)
    write_class(tmp_path / "elsewhere", "leaf", 2)
    (root / "leaf").symlink_to(tmp_path / "elsewhere" / "leaf")
    (root / "apple" / "again").symlink_to(root)  # a loop
    dataset = FolderDataset(root)
    assert dataset.class_names == ("apple", "leaf")
    assert len(dataset.split("train", SMALL)) == 4


def test_a_class_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COLOURS:
        write_class(tmp_path, name, 2)
    listed = Path.iterdir

    def iterdir(self: Path) -> Iterator[Path]:  # root may read everything
        if self.name == "leaf":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(DataError, match=r"folder '.*/leaf' cannot be read: Permission denied"):
        FolderDataset(tmp_path)


def test_names_that_are_no_utf8_have_a_hash(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "plain.png")
    (tmp_path / "plain.png").rename(tmp_path / os.fsdecode(b"caf\xe9.png"))
    assert "sha256:" in FolderDataset(tmp_path).split("train", SMALL).description


def test_an_image_whose_white_nobody_knows_is_named(tmp_path: Path) -> None:
    Image.new("F", (20, 20)).save(tmp_path / "depth.tif")
    with pytest.raises(DataError, match=r"image '.*/depth\.tif' cannot be read: nobody knows what white is"):
        list(FolderDataset(tmp_path).split("train", SMALL).batches(1))


def test_missing_train_is_an_error_when_asked_for(tmp_path: Path) -> None:
    write_class(tmp_path / "val", "apple", 3)
    dataset = FolderDataset(tmp_path)
    assert len(dataset.split("test", SMALL)) == 3
    with pytest.raises(DataError, match="has no train images"):
        dataset.split("train", SMALL)


def test_loose_images_are_unlabeled(tmp_path: Path) -> None:
    for index in range(10):
        Image.new("L", (30, 20), index * 20).save(tmp_path / f"{index}.bmp")
    dataset = FolderDataset(tmp_path)
    assert (dataset.num_classes, dataset.class_names) == (None, ())
    split = dataset.split("train", SMALL)
    assert (len(split), split.labels) == (7, None)
    images, labels = next(split.batches(3))
    assert (images.shape, labels) == ((3, 3, 16, 16), None)


def test_imagenets_synsets_keep_imagenets_indices(tmp_path: Path) -> None:
    write_class(tmp_path, "n01443537", 5)
    write_class(tmp_path, "n03445777", 5)
    dataset = FolderDataset(tmp_path)
    assert dataset.num_classes == 1000
    labels = dataset.split("train", SMALL).labels
    assert labels is not None
    assert set(labels) == {1, 574}


def test_hash_follows_content(tmp_path: Path) -> None:
    write_class(tmp_path, "apple", 5)
    before = FolderDataset(tmp_path).split("train", SMALL).description
    assert before.startswith(f"{tmp_path} train, 3 images, sha256:")
    for file in (tmp_path / "apple").iterdir():
        pixels = bytearray(file.read_bytes())
        pixels[-1] ^= 1
        file.write_bytes(pixels)
    assert FolderDataset(tmp_path).split("train", SMALL).description != before


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_unreadable_image_is_named(tmp_path: Path, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad.jpg")
    content = (tmp_path / "bad.jpg").read_bytes()
    (tmp_path / "bad.jpg").write_bytes(
        {"text": b"hello", "truncated": content[: len(content) // 2], "empty": b""}[damage]
    )
    split = FolderDataset(tmp_path).split("train", SMALL)
    with pytest.raises(DataError, match=rf"image '{tmp_path}/bad\.jpg' cannot be read"):
        list(split.batches(1))


def test_folders_without_use_give_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images") as caught:
        FolderDataset(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="does not exist"):
        FolderDataset(tmp_path / "none")
    write_class(tmp_path, "apple", 2)
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match="mixes class folders with loose images"):
        FolderDataset(tmp_path)


def test_a_class_beside_splits_is_refused(tmp_path: Path) -> None:
    for part in ("train", "val"):
        write_class(tmp_path / part, "apple", 2)
    write_class(tmp_path, "extra", 2)
    with pytest.raises(DataError, match="has 'extra' beside 'train', which is a split"):
        FolderDataset(tmp_path)


def test_classes_called_train_among_others_are_classes(tmp_path: Path) -> None:
    for name in ("train", "bus"):
        write_class(tmp_path, name, 5)
    assert FolderDataset(tmp_path).class_names == ("bus", "train")


@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_what_other_programs_would_have_to_decode_is_refused(name: str, tmp_path: Path) -> None:
    write_class(tmp_path, "b", 1)
    (tmp_path / "a").mkdir()
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "a" / name).write_bytes(script)
    with Image.open(tmp_path / "a" / name) as image:
        assert image.format == "EPS", "Pillow would give it to Ghostscript"
    with pytest.raises(DataError, match="cannot identify image file"):
        list(FolderDataset(tmp_path).split("train", Preprocessing()).batches(1))


def test_an_image_too_long_to_be_resized_is_named(tmp_path: Path) -> None:
    write_class(tmp_path, "b", 1)
    (tmp_path / "a").mkdir()
    Image.new("RGB", (100_000, 1)).save(tmp_path / "a" / "x.png")
    with pytest.raises(DataError, match=r"x\.png' cannot be read: 100000x1 pixels are too long and thin"):
        list(FolderDataset(tmp_path).split("train", Preprocessing()).batches(1))


def test_splits_are_known_by_names_like_theirs(tmp_path: Path) -> None:
    for split in ("Training", "test_set"):
        (tmp_path / split).mkdir()
        write_class(tmp_path / split, "apple", 6)
        write_class(tmp_path / split, "leaf", 6)
    dataset = FolderDataset(tmp_path)
    assert dataset.num_classes == 2
    assert len(dataset.split("test", SMALL)) == 12
    (tmp_path / "test").mkdir()
    write_class(tmp_path / "test", "apple", 6)
    with pytest.raises(DataError, match="has both 'test' and 'test_set'"):
        FolderDataset(tmp_path)
