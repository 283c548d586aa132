"""The model and the data a command was given, each part of the data in its role."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from optc.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from optc.data.dataset import Dataset
    from optc.frontend.load import LoadedModel
    from optc.passmanager.contract import Calibration
    from optc.progress import Progress

CALIBRATION_IMAGES = 128
CALIBRATION_BATCH = 16
VERIFICATION_IMAGES = 16
EVALUATION_BATCH = 32
BIG_MODEL_PARAMETERS = 200_000_000
"""From here on a forward pass takes seconds: calibrate and verify on fewer images."""
BIG_MODEL_IMAGES = 4


def load(
    model: str, weights: str, data: str | None, seed: int, progress: Progress
) -> tuple[LoadedModel, Dataset | None]:
    """Load a model and open the dataset it is to be calibrated and evaluated on; random weights get its classes.

    Raises:
        UnknownNameError, WeightsError, DataError: as the loaders say; labels that do not fit the model's outputs.
    """
    from optc.data.dataset import open_dataset
    from optc.frontend.load import load_model

    dataset = open_dataset(data) if data else None
    with progress.step(f"Loading {model}") as step:
        classes = dataset.num_classes if dataset and weights == "random" else None
        loaded = load_model(model, weights, classes, seed)
        step.done(f"from {loaded.info.source}, weights: {loaded.info.weights}")
    for note in loaded.info.notes:
        progress.note(note, important=True)
    return loaded, dataset


class Data:
    """Gives each part of a dataset its role: calibration sees the training split only, accuracy the test split.

    Without a dataset, seeded synthetic images stand in for calibration and verification, and there is no accuracy.
    """

    def __init__(self, loaded: LoadedModel, dataset: Dataset | None) -> None:
        from optc.data.synthetic import SyntheticDataset

        self._loaded = loaded
        self._dataset = dataset
        self._images = dataset or SyntheticDataset()
        self._big = sum(p.numel() for p in loaded.module.parameters()) > BIG_MODEL_PARAMETERS
        self._is_image_model = [tuple(t.shape[1:]) for t in loaded.example_inputs] == [
            loaded.info.preprocessing.input_size
        ]
        if dataset is not None and not self._is_image_model:
            raise DataError(
                f"'{loaded.info.name}' does not take images, so --data has no use for it", "leave --data away"
            )

        if dataset is not None and dataset.num_classes is not None:
            dataset.check_classes(_outputs(loaded))

    def calibration(self) -> Calibration | None:
        """Batches of the training split; the example inputs of a model that does not take images."""
        from optc.data.calibration import DatasetCalibration

        if not self._is_image_model:
            return None
        count = BIG_MODEL_IMAGES if self._big else CALIBRATION_IMAGES
        batch = min(CALIBRATION_BATCH, count)
        return DatasetCalibration(self._images.split("train", self._loaded.info.preprocessing), batch, count // batch)

    def verification(self) -> list[tuple[Tensor, ...]] | None:
        """Batches of the validation split, to compare outputs on."""
        if not self._is_image_model:
            return None
        count = BIG_MODEL_IMAGES if self._big else VERIFICATION_IMAGES
        split = self._images.split("validation", self._loaded.info.preprocessing)
        return [(images,) for images, _ in split.batches(min(8, count), limit=count)]

    def evaluator(self, progress: Progress) -> Callable[[Callable[..., Any]], float] | None:
        """Top-1 accuracy over the whole test split, or ``None`` without labels."""
        from optc.data.evaluate import evaluate

        dataset = self._dataset
        if dataset is None or dataset.num_classes is None:
            return None
        split = dataset.split("test", self._loaded.info.preprocessing)
        return lambda call: evaluate(call, split, EVALUATION_BATCH).top1


def _outputs(loaded: LoadedModel) -> int:
    """How many classes a model scores.

    Raises:
        DataError: it does not return scores of shape (batch, classes).
    """
    import torch

    with torch.no_grad():
        scores = loaded.module(*loaded.example_inputs)
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
        raise DataError(f"'{loaded.info.name}' does not return one score per class", "leave --data away")
    return int(scores.shape[1])
