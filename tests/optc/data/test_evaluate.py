"""Accuracy, held against classifiers whose accuracy is known."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from optc.data.digits import DigitsDataset
from optc.data.evaluate import evaluate
from optc.data.synthetic import SyntheticDataset
from optc.errors import DataError
from optc.program import Preprocessing

PLAIN = Preprocessing(input_size=(1, 8, 8), mean=(0.0,), std=(1.0,))


def test_equals_scikit_learns_score() -> None:
    (train, labels), (test, answers) = (
        next(DigitsDataset().split(name, PLAIN).batches(2000)) for name in ("train", "test")
    )  # type: ignore[arg-type]
    assert labels is not None
    assert answers is not None
    classifier = LogisticRegression(max_iter=500).fit(train.flatten(1).numpy(), labels.numpy())
    layer = nn.Linear(64, 10)
    layer.weight.data = torch.from_numpy(classifier.coef_).float()
    layer.bias.data = torch.from_numpy(classifier.intercept_).float()
    told: list[str] = []
    accuracy = evaluate(nn.Sequential(nn.Flatten(), layer), DigitsDataset().split("test", PLAIN), 100, told.append)
    assert accuracy.total == 359
    assert accuracy.top1 == pytest.approx(classifier.score(test.flatten(1).numpy(), answers.numpy()), abs=1e-9)
    assert accuracy.top1 > 0.9
    assert len(told) == 4
    assert "359/359" in told[-1]


def test_unlabeled_images_have_no_accuracy() -> None:
    with pytest.raises(DataError, match="labels"):
        evaluate(nn.Flatten(), SyntheticDataset().split("test", PLAIN), 8)


def test_outputs_that_are_no_scores_are_refused() -> None:
    def features(x: Tensor) -> Tensor:
        return x

    with pytest.raises(DataError, match="one output of shape"):
        evaluate(features, DigitsDataset().split("test", PLAIN), 8)


def test_scores_with_nan_are_no_class() -> None:
    split = DigitsDataset().split("test", PLAIN)
    answers = [label for _, labels in split.batches(500) for label in labels]  # type: ignore[union-attr]
    assert 0 in answers
    nothing = evaluate(lambda images: torch.full((len(images), 10), float("nan")), split, 100)
    assert (nothing.correct, nothing.total) == (0, 359)
