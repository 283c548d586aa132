"""How far outputs are from what they should be, in decibels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio in dB from the two energies; infinite without noise."""
    if noise == 0.0:
        return math.inf
    if signal == 0.0 or not math.isfinite(noise):
        return -math.inf
    return 10.0 * math.log10(signal / noise)


def decides(dtype: object) -> bool:
    """Whether values of a type (PyTorch's or numpy's) are decisions, as those of an arg-max or a mask.

    Whole numbers and booleans are; bytes are not: they are what amplitudes are quantized to.
    """
    name = str(dtype).removeprefix("torch.")
    return name == "bool" or (name.startswith(("int", "uint")) and not name.endswith("int8"))


def decisions_db(reference: np.ndarray[Any, Any], output: np.ndarray[Any, Any]) -> float:
    """What stands for the SQNR where values are decisions: there is no amplitude in which class 7 is near class 8.

    The share that differs takes the place of the relative error: of decisions on noisy amplitudes about as many fall
    the other way. So 1 in 100 are 40 dB. It is counted against the decisions that are not the most frequent one, if
    there are any: a mask that loses its few pixels, or a picture that becomes all background, is not nearly right.
    """
    differing = int((reference != output).sum())
    _, counts = np.unique(reference, return_counts=True)
    others = reference.size - int(counts.max(initial=0)) or reference.size
    return 20.0 * math.log10(others / differing) if differing else math.inf
