from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optc import Runner
from optc.bench.accuracy import LOG, measure_accuracy
from optc.bench.settings import SCENARIOS, Scenario
from optc.data.dataset import Split, open_dataset
from optc.data.synthetic import SyntheticDataset
from optc.errors import DataError, MeasurementError
from optc.lowering.manifest import sha256
from optc.program import Preprocessing

SMALL = Preprocessing(input_size=(3, 8, 8), resize=8)


class _Knows(Runner):
    """Knows the label of every image but the first few."""

    provider, precision = "test", "float32"

    def __init__(self, split: Split, wrong: int) -> None:
        images, labels = next(split.batches(len(split)))
        assert labels is not None
        self.classes = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
        for key in list(self.classes)[:wrong]:
            self.classes[key] = (self.classes[key] + 1) % 10
        self.batches: set[int] = set()

    def __call__(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        self.batches.add(len(inputs[0]))
        scores = np.zeros((len(inputs[0]), 10), np.float32)
        for row, image in enumerate(inputs[0]):
            scores[row, self.classes[image.tobytes()]] = 1
        return (scores,)


@pytest.fixture(scope="module")
def digits() -> Split:
    return open_dataset("digits").split("test", SMALL)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_image_counts_once_in_every_scenario(scenario: Scenario, digits: Split, tmp_path: Path) -> None:
    runner = _Knows(digits, wrong=5)
    wrong = sum(runner.classes[key] != value for key, value in _Knows(digits, wrong=0).classes.items())
    found = measure_accuracy(scenario, runner, digits, "m", model="m", batch=8, log_folder=tmp_path)
    assert found.total == len(digits)
    assert found.total - found.correct >= wrong >= 1
    assert found.correct > 0.9 * found.total
    if scenario in ("MultiStream", "Offline"):
        assert max(runner.batches) == 8
    entries = json.loads((tmp_path / LOG).read_text())
    assert {entry["qsl_idx"] for entry in entries} == set(range(len(digits)))
    first, second = (tmp_path / "accuracy.txt").read_text().splitlines()
    assert first == f"accuracy={100 * found.top1:.3f}%, good={found.correct}, total={found.total}"
    assert second == f"hash={sha256(tmp_path / LOG)}"


def test_unlabelled_images_have_no_accuracy(digits: Split) -> None:
    unlabelled = SyntheticDataset().split("test", SMALL)
    with pytest.raises(MeasurementError, match="has no labels"):
        measure_accuracy("Offline", _Knows(digits, 0), unlabelled, "m", model="m", batch=8)


def test_images_that_do_not_fit_into_memory_are_refused(digits: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.machine.available_memory", lambda: 1000)
    with pytest.raises(MeasurementError, match="over half the free memory"):
        measure_accuracy("Offline", _Knows(digits, 0), digits, "m", model="m", batch=8)


def test_other_classes_than_the_models_are_refused(digits: Split) -> None:
    check = open_dataset("digits").check_classes
    assert measure_accuracy("Offline", _Knows(digits, 0), digits, "m", model="m", batch=8, check_classes=check).total

    class Other(_Knows):
        def __call__(self, *inputs: Any) -> Any:
            return tuple(np.pad(output, ((0, 0), (0, 990))) for output in super().__call__(*inputs))

    with pytest.raises(DataError, match="has 10 classes but the model has 1000 outputs"):
        measure_accuracy("Offline", Other(digits, 0), digits, "m", model="m", batch=8, check_classes=check)

    class Map(_Knows):
        def __call__(self, *inputs: Any) -> Any:
            return tuple(output[:, :, None, None] for output in super().__call__(*inputs))

    with pytest.raises(MeasurementError, match="not scores per class"):
        measure_accuracy("Offline", Map(digits, 0), digits, "m", model="m", batch=8)


def test_a_model_that_cannot_run_one_image_is_one_line(digits: Split) -> None:
    class Picky(_Knows):
        def __call__(self, *inputs: Any) -> Any:
            raise ZeroDivisionError("batches of four only")

    with pytest.raises(MeasurementError, match="it cannot run one image: ZeroDivisionError: batches of four only"):
        measure_accuracy("Offline", Picky(digits, 0), digits, "m", model="m", batch=8)


def test_scores_with_nan_are_no_class(digits: Split) -> None:
    class Broken(_Knows):
        def __call__(self, *inputs: Any) -> Any:
            return tuple(np.full_like(output, np.nan) for output in super().__call__(*inputs))

    assert measure_accuracy("Offline", Broken(digits, 0), digits, "m", model="m", batch=8).correct == 0


@pytest.mark.parametrize("scenario", ["SingleStream", "Offline"])
def test_a_model_of_one_batch_size_is_given_that(digits: Split, scenario: Scenario) -> None:
    class OfThree(_Knows):
        def __call__(self, *inputs: Any) -> Any:
            if len(inputs[0]) != 3:
                raise ValueError("Expected: 3")
            return super().__call__(*inputs)

    assert measure_accuracy(scenario, OfThree(digits, 0), digits, "m", model="m", batch=3).correct > 300
