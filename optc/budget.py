"""The accuracy budget: by how much a metric may fall, and whether it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from optc.errors import OptcError

Call = Callable[..., Any]
_ROUNDING = 1e-6
ACCURACY, AGREEMENT = "accuracy", "top-1 agreement"


@dataclass(frozen=True)
class Metric:
    """A score between 0 and 1 of anything callable like the model.

    Attributes:
        name: what it is called in reports.
        score: the score of a callable.
        data: what it is taken on, such as ``"359 test images of digits"``.
    """

    name: str
    score: Callable[[Call], float]
    data: str = ""

    def __call__(self, call: Call) -> float:
        """The score of ``call``; NaN, as of a model that gives NaN, is below every other.

        Raises:
            OptcError: what it is scored with returned anything else than a number from 0 to 1.
        """
        score: Any = self.score(call)
        wrong = OptcError(f"the {self.name} of the model came out as {score!r}", "return a number from 0 to 1")
        try:
            value = float(score)
        except (TypeError, ValueError):
            raise wrong from None
        if value < -_ROUNDING or value > 1.0 + _ROUNDING:
            raise wrong
        return min(max(value, 0.0), 1.0) if math.isfinite(value) else value


def agreement(model: Call, batches: Sequence[tuple[Tensor, ...]], data: str = "") -> Metric:
    """Share of samples whose largest output stays ``model``'s own: what is left of accuracy where labels are missing.

    Taken over the first output, along its last dimension; of integers and truth values, which are decisions already,
    each for itself. The model is run once, when the metric is first asked.

    Raises:
        OptcError: by the metric, of outputs that have no largest one.
    """
    wanted: list[Tensor] = []

    @torch.no_grad()
    def score(call: Call) -> float:
        if not wanted:
            wanted.extend(_largest(model(*batch)) for batch in batches)
        same = [(_largest(call(*batch)) == want).float() for batch, want in zip(batches, wanted, strict=True)]
        return float(torch.cat([part.flatten() for part in same]).mean())

    samples = sum(len(batch[0]) for batch in batches)
    return Metric(AGREEMENT, score, data or f"{samples} samples")


def _largest(outputs: Any) -> Tensor:
    first: Tensor = pytree.tree_leaves(outputs)[0]
    if not first.is_floating_point() and not first.is_complex():
        return first
    if first.is_complex() or first.ndim < 2 or first.shape[-1] == 1:
        raise OptcError(
            f"outputs of {first.dtype} and shape {tuple(first.shape)} have no largest one, which is compared where"
            " there are no labels",
            "give labelled --data, or evaluate= in Python, or leave --max-drop away",
        )
    return first.argmax(-1).masked_fill(first.isnan().any(-1), -1)


@dataclass(frozen=True)
class Budget:
    """A metric that may fall ``max_drop`` percentage points below ``reference``, the model's own score (0 to 1).

    Attributes:
        min_sqnr_db: least SQNR of the outputs, in dB: tells apart what a score on a few hundred samples cannot.
    """

    metric: Metric
    reference: float
    max_drop: float
    min_sqnr_db: float = -math.inf

    def drop(self, call: Call) -> float:
        """Percentage points by which ``call`` scores below the reference; negative if above."""
        return 100 * (self.reference - self.metric(call))

    def excess(self, call: Call) -> str | None:
        """Why ``call`` exceeds the budget, or ``None``."""
        drop = self.drop(call)
        if exceeds(drop, self.max_drop):
            return f"{self.metric.name} falls by {drop:.2f} points on {self.metric.data}, more than {self.max_drop:g}"
        return None


def exceeds(drop: float, max_drop: float) -> bool:
    """Whether a drop is above a limit by more than the rounding of a share in floating point."""
    return not drop <= max_drop + 1e-9
