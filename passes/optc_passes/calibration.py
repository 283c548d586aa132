"""Reading calibration data: batch by batch, each looked at before it is used."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import Tensor

from optc import Calibration, DataError, PassContext

Batch = tuple[Tensor, ...]
LEAST_SAMPLES = 8
"""Fewer say little of a range: an activation's largest value keeps growing with every sample."""


def checked(calibration: Calibration, inputs: int, context: PassContext) -> Iterator[Batch]:
    """The batches, with progress.

    Args:
        inputs: how many tensors a batch has.

    Raises:
        DataError: a batch has another number of tensors or holds NaN or Inf; at the end, there were fewer than
            :data:`LEAST_SAMPLES` samples.
    """
    total = operator.length_hint(calibration, 0)
    samples = 0
    for number, batch in enumerate(calibration, 1):
        context.progress(f"calibrating {number}/{total}" if total else f"calibrating {number}")
        what = f"calibration batch {number} of '{calibration.description}'"
        if len(batch) != inputs:
            raise DataError(f"{what} has {len(batch)} tensors, the model takes {inputs}", "give one per model input")
        if not all(bool(tensor.isfinite().all()) for tensor in batch):
            raise DataError(f"{what} holds NaN or Inf", "clean the data")
        samples += len(batch[0])
        yield tuple(batch)
    if samples < LEAST_SAMPLES:
        raise DataError(
            f"calibration data '{calibration.description}' holds {samples or 'no'} samples, fewer than {LEAST_SAMPLES}",
            "give more",
        )
