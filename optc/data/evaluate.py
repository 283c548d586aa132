"""Top-1 accuracy of anything callable like a classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from optc.data.dataset import Split
from optc.errors import DataError


@dataclass(frozen=True)
class Accuracy:
    """``correct`` of ``total`` images were given their label's class."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """Share of correct images, 0 to 1."""
        return self.correct / self.total


@torch.no_grad()
def evaluate(
    call: Callable[..., Any], split: Split, batch_size: int, progress: Callable[[str], None] = lambda text: None
) -> Accuracy:
    """Run every image of a labelled split and count those whose largest output is their label.

    Args:
        call: takes float32 images (N, C, H, W), returns scores (N, classes).

    Raises:
        DataError: the split has no labels, or the outputs are not scores per class.
    """
    correct = total = 0
    for images, labels in split.batches(batch_size):
        if labels is None:
            raise DataError(f"'{split.dataset}' has no labels to measure accuracy with", "use a labelled dataset")
        scores = call(images)
        if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
            raise DataError("accuracy needs a model with one output of shape (batch, classes)", "leave --data away")
        # Of scores with NaN, arg-max takes one of those, which may be the label's.
        found = scores.argmax(1).masked_fill(scores.isnan().any(1), -1)
        correct += int((found.cpu() == labels).sum())
        total += len(labels)
        progress(f"{total}/{len(split)} images")
    return Accuracy(correct, total)
