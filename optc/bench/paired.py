"""Ratios for ``optc compare``, at a level that a model compared with itself holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from optc.bench.statistics import Ratio

CONFIDENCE = 0.99
"""At 95 % one comparison in twenty of a model with itself shows a difference, and more on a busy machine."""
METHOD = (
    "geometric mean of the blocks' ratios of medians; percentile bootstrap over whole blocks, expanded for few blocks"
    " (Hesterberg 2015); below six blocks Student's t"
)
_RESAMPLES, _SEED = 20_000, 0
_FEWEST_RESAMPLED = 6


def block_ratio(first: Sequence[ArrayLike], second: Sequence[ArrayLike], *, paired: bool) -> Ratio:
    """Ratio of latencies ``first / second``, from the medians of their blocks.

    Each block counts once, however many queries it holds, so that one in which the machine was busy elsewhere weighs no
    more than another. On logarithms of medians the bootstrap is close to its level where that of pooled medians is not
    (``benchmarks/same_model.py``).

    Args:
        first, second: latencies (any unit), one array per block.
        paired: block ``i`` of both was measured at about the same time; blocks that one has beyond the other's are left
            out then.

    Returns:
        The ratio; with fewer than two blocks its interval is (0, inf), for nothing is known of the spread.
    """
    a, b = _log_medians(first), _log_medians(second)
    if paired:
        common = min(len(a), len(b))
        a, b = a[:common] - b[:common], np.zeros(common)
    value = float(a.mean() - b.mean())
    count = min(len(a), len(b))
    if count < 2:
        return Ratio(math.exp(value), 0.0, math.inf, CONFIDENCE, METHOD, paired)
    from scipy import stats  # half a second to import, so only when something was measured

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    if count < _FEWEST_RESAMPLED:
        half = quantile * math.sqrt(sum(x.var(ddof=1) / len(x) for x in (a, b)))
        low, high = value - half, value + half
    else:
        generator = np.random.default_rng(_SEED)
        resampled = _resampled_means(a, generator) - _resampled_means(b, generator)
        tail = float(stats.norm.sf(quantile * math.sqrt(count / (count - 1))))
        low, high = (float(bound) for bound in np.quantile(resampled, [tail, 1 - tail]))
    return Ratio(math.exp(value), math.exp(min(low, value)), math.exp(max(high, value)), CONFIDENCE, METHOD, paired)


def _log_medians(blocks: Sequence[ArrayLike]) -> NDArray[np.float64]:
    return np.log([float(np.median(np.asarray(block))) for block in blocks])


def _resampled_means(values: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    means: NDArray[np.float64] = values[generator.integers(0, len(values), (_RESAMPLES, len(values)))].mean(axis=1)
    return means
