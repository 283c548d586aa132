"""Splits, names, class counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from optc.data.dataset import named_split, open_dataset, stratified_split
from optc.data.digits import DigitsDataset
from optc.data.folder import FolderDataset
from optc.data.synthetic import SyntheticDataset
from optc.errors import DataError, PluginError, UnknownNameError
from optc.program import Preprocessing


def test_stratified_split_is_disjoint_complete_and_proportional() -> None:
    labels = np.repeat(np.arange(3), [100, 50, 10])
    parts = stratified_split(labels)
    together = np.concatenate(list(parts.values()))
    assert sorted(together) == list(range(160))
    counts = {name: np.bincount(labels[indices]).tolist() for name, indices in parts.items()}
    assert counts == {"train": [70, 35, 7], "validation": [10, 5, 1], "test": [20, 10, 2]}


def test_stratified_split_follows_its_seed_and_mixes_classes() -> None:
    labels = np.repeat(np.arange(4), 50)
    first, again, other = stratified_split(labels), stratified_split(labels), stratified_split(labels, seed=1)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["train"], other["train"])
    assert set(labels[first["train"][:20]]) == {0, 1, 2, 3}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_images_go_to_train_first(count: int) -> None:
    parts = stratified_split(np.zeros(count, np.int64))
    assert len(parts["train"]) >= 1
    assert sum(map(len, parts.values())) == count


def test_open_dataset_by_name_and_by_path(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert isinstance(open_dataset("digits"), DigitsDataset)
    assert isinstance(open_dataset("synthetic"), SyntheticDataset)
    assert isinstance(open_dataset(str(tmp_path)), FolderDataset)


def test_unknown_dataset_suggests_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="unknown dataset 'digit' — did you mean digits"):
        open_dataset("digit")
    with pytest.raises(UnknownNameError, match="or a folder of images"):
        open_dataset("/no/such/folder")


def test_unknown_split_is_refused() -> None:
    for dataset in (DigitsDataset(), SyntheticDataset()):
        with pytest.raises(DataError, match="unknown split 'val' — splits are train, validation, test"):
            dataset.split("val", Preprocessing())  # type: ignore[arg-type]


def test_number_of_classes_is_held_against_the_model() -> None:
    DigitsDataset().check_classes(10)
    SyntheticDataset().check_classes(7)
    with pytest.raises(DataError, match="'digits' has 10 classes but the model has 1000 outputs"):
        DigitsDataset().check_classes(1000)


@pytest.mark.parametrize("part", ["batches", "labels", "content_hash"])
def test_what_a_split_raises_names_its_plugin(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, preprocessing = DigitsDataset(), Preprocessing(input_size=(3, 8, 8))
    plain, named = dataset.split("test", preprocessing), named_split(dataset, "test", preprocessing)
    assert (len(named), named.labels, named.description) == (len(plain), plain.labels, plain.description)
    assert all(map(torch.equal, next(named.batches(4)), next(plain.batches(4))))

    def fail(*arguments: object) -> None:
        raise KeyError("images")

    monkeypatch.setattr(type(plain), part, fail if part == "batches" else property(fail))
    with pytest.raises(PluginError, match=r"dataset 'digits' \(from .*\) raised KeyError: 'images'"):
        list(named.batches(4)) if part == "batches" else getattr(named, part)
