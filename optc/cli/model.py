"""The model and the data a command was given, each part of the data in its role."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from optc.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from optc.budget import Call, Metric
    from optc.data.dataset import Dataset, Split, SplitName
    from optc.frontend.load import LoadedModel
    from optc.passmanager.contract import Calibration
    from optc.progress import Progress

CALIBRATION_IMAGES = 128
CALIBRATION_BATCH = 16
VERIFICATION_IMAGES = 16
EVALUATION_BATCH = 32
BIG_MODEL_PARAMETERS = 200_000_000
"""From here on a forward pass takes seconds: calibrate and verify on fewer images."""
BIG_MODEL_IMAGES = 8
BIG_MODEL_BATCH = 4
AGREEMENT_IMAGES = 64
"""Images on which outputs are compared where accuracy cannot be had."""


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
        progress.note(note)
    if dataset and loaded.info.source == "factory" and not loaded.info.notes:
        assumed = f"{model} does not say how images are prepared for it: ImageNet's mean and std were assumed"
        loaded = replace(loaded, info=replace(loaded.info, notes=(assumed,)))  # for the report
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
        self._is_image_model = _takes_images(loaded)
        self._kind = loaded.example_inputs[0].dtype
        if dataset is not None and not self._is_image_model:
            raise DataError(
                f"'{loaded.info.name}' does not take images, so --data has no use for it", "leave --data away"
            )

        channels = loaded.info.preprocessing.input_size[0]
        if dataset is not None and channels not in (1, 3):
            raise DataError(
                f"'{loaded.info.name}' takes {channels} channels, and images have one or three", "leave --data away"
            )
        if dataset is not None and dataset.num_classes is not None:
            dataset.check_classes(_outputs(loaded))

    def calibration(self) -> Calibration | None:
        """Batches of the training split; nothing for a model that does not take images."""
        from optc.data.calibration import DatasetCalibration

        if not self._is_image_model:
            return None
        batch = BIG_MODEL_BATCH if self._big else CALIBRATION_BATCH
        # A model that takes one number of images only needs as many; others have one or two.
        count = max(BIG_MODEL_IMAGES if self._big else CALIBRATION_IMAGES, len(self._loaded.example_inputs[0]))
        return DatasetCalibration(self._split("train"), batch, -(-count // batch), self._kind)

    def verification(self) -> list[tuple[Tensor, ...]] | None:
        """Batches of the validation split, to compare outputs on."""
        if not self._is_image_model:
            return None
        count = max(BIG_MODEL_IMAGES if self._big else VERIFICATION_IMAGES, len(self._loaded.example_inputs[0]))
        return self._batches(self._split("validation"), BIG_MODEL_BATCH if self._big else 8, count)

    @property
    def no_accuracy(self) -> str:
        """Why there is no accuracy to measure; empty if there is."""
        if self._loaded.info.weights == "random":
            return "random weights have no accuracy to lose"
        if self._dataset is None:
            return "there is no --data"
        return "" if self._dataset.num_classes is not None else f"'{self._dataset.label}' has no labels"

    def metric(self, split: SplitName, agree: bool) -> Metric | None:
        """Top-1 accuracy over a whole split.

        Args:
            agree: where there is no accuracy, take agreement with the model as loaded, on some images of the split.
        """
        from torch.utils import _pytree as pytree

        from optc.batches import in_batches_of
        from optc.budget import ACCURACY, Metric, agreement
        from optc.data.evaluate import evaluate

        if not self._is_image_model or (self.no_accuracy and not agree):
            return None
        part = self._split(split)
        if not self.no_accuracy:
            what = f"{len(part)} {split} images of {part.dataset}"

            def top1(call: Call) -> float:
                return evaluate(lambda images: call(images.to(self._kind)), part, EVALUATION_BATCH).top1

            return Metric(ACCURACY, top1, what)
        count = min(BIG_MODEL_IMAGES if self._big else AGREEMENT_IMAGES, len(part))
        batches = self._batches(part, min(EVALUATION_BATCH, count), count)

        def first(*inputs: Tensor) -> Any:
            return pytree.tree_leaves(self._loaded.module(*inputs))[0]

        # As many at a time as its example inputs are: it may take no other number.
        model = in_batches_of(len(self._loaded.example_inputs[0]), first)
        return agreement(model, batches, f"{count} {split} images of {part.dataset}")

    def _split(self, name: SplitName) -> Split:
        from optc.data.dataset import named_split

        return named_split(self._images, name, self._loaded.info.preprocessing)

    def _batches(self, split: Split, batch: int, count: int) -> list[tuple[Tensor, ...]]:
        return [(images.to(self._kind),) for images, _ in split.batches(batch, limit=count)]


def _takes_images(loaded: LoadedModel) -> bool:
    """Whether the model's one input is images as its preprocessing makes them: floats, and more than a pixel."""
    sizes = [tuple(tensor.shape[1:]) for tensor in loaded.example_inputs]
    kinds = [tensor.is_floating_point() for tensor in loaded.example_inputs]
    size = loaded.info.preprocessing.input_size
    return sizes == [size] and kinds == [True] and size[1:] != (1, 1)


def _outputs(loaded: LoadedModel) -> int:
    """How many classes a model scores.

    Raises:
        CaptureError: it does not run on its example inputs.
        DataError: it does not return scores of shape (batch, classes).
    """
    import torch

    from optc.frontend.capture import capture_error

    try:
        with torch.no_grad():
            scores = loaded.module(*loaded.example_inputs)
    except Exception as error:
        raise capture_error(loaded.module, error) from error
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
        raise DataError(f"'{loaded.info.name}' does not return one score per class", "leave --data away")
    return int(scores.shape[1])
