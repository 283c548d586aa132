"""Percentiles, ratios with confidence intervals, and whether a measurement was steady."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
BEYOND_DRIFT = 0.97
"""Ratio below which two that did not take turns differ by more than a machine that grows slower in between."""
RESAMPLES, FEW_RESAMPLES = 9999, 1999
"""For what is told to people, and to decide between further blocks, which those would cost more than they tell."""
_POINTS_PER_BLOCK = 101
_SEED = 0
PERCENTILE_METHOD = "linear interpolation between order statistics, over all blocks' queries pooled"
RATIO_METHOD = (
    "ratio of pooled medians; percentile bootstrap over whole blocks, expanded for few blocks (Hesterberg 2015); below"
    " six blocks Student's t over the logarithms of the blocks' medians"
)
_FEWEST_RESAMPLED = 6
"""Blocks from which on they are resampled: all of ``n`` resampled ratios lie between the least and the largest block's,
which cover the truth in 1 - 2^(1-n) of cases at most."""


@dataclass(frozen=True)
class Percentiles:
    """Latency percentiles in nanoseconds over ``count`` queries, and how they were computed."""

    p50_ns: float
    p90_ns: float
    p99_ns: float
    count: int
    method: str = PERCENTILE_METHOD


@dataclass(frozen=True)
class Ratio:
    """A ratio of median latencies (below 1: the first is faster) and its confidence interval.

    Attributes:
        interleaved: whether the two took turns. If not, what changed on the machine in between is in the ratio but not
            in its interval.
    """

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE
    method: str = RATIO_METHOD
    interleaved: bool = True

    @property
    def outcome(self) -> str:
        """``"faster"`` or ``"slower"`` if the whole interval says so, by more than drift, else ``"no difference"``."""
        least = 1.0 if self.interleaved else BEYOND_DRIFT
        if self.high < least:
            return "faster"
        return "slower" if self.low > 1 / least else "no difference"

    @property
    def doubt(self) -> str:
        """Why no difference is shown."""
        if self.low <= 1 <= self.high:
            return "the interval contains 1"
        return f"as much as {1 - BEYOND_DRIFT:.0%} may be drift where they do not take turns"


def percentiles(blocks: Sequence[ArrayLike]) -> Percentiles:
    """p50, p90 and p99 of the latencies (ns) of all blocks together. Needs at least one latency."""
    pooled = np.concatenate([np.asarray(block, dtype=np.float64) for block in blocks])
    p50, p90, p99 = np.percentile(pooled, [50, 90, 99])
    return Percentiles(float(p50), float(p90), float(p99), pooled.size)


def ratio_of_medians(
    first: Sequence[ArrayLike], second: Sequence[ArrayLike], *, interleaved: bool, resamples: int = RESAMPLES
) -> Ratio:
    """Ratio of the pooled median latencies of two candidates, ``first / second``.

    Queries within a block share the machine's state of that moment, so whole blocks are resampled, not queries
    (otherwise the interval comes out far too narrow). Interleaved blocks are resampled in pairs: what slowed the
    machine for a while slowed both. A percentile bootstrap of few units is too narrow; its level is widened as in
    Hesterberg, "What Teachers Should Know About the Bootstrap" (2015), on expanded percentile intervals.

    Args:
        first, second: latencies (any unit), one array per block.
        interleaved: block ``i`` of both was measured at about the same time; blocks that one has beyond the other's
            are left out then.

    Returns:
        The ratio; with fewer than two blocks its interval is (0, inf), for nothing is known of the spread.
    """
    if interleaved:
        common = min(len(first), len(second))
        first, second = first[:common], second[:common]
    value = _pooled_median(first) / _pooled_median(second)
    if min(len(first), len(second)) < 2:
        return Ratio(value, 0.0, math.inf, interleaved=interleaved)
    if min(len(first), len(second)) < _FEWEST_RESAMPLED:
        spread = _t_interval(first, second, paired=interleaved)
        return Ratio(value, value * math.exp(-spread), value * math.exp(spread), interleaved=interleaved)
    from scipy import stats  # half a second to import, so only when something was measured

    a, b = _thinned(first), _thinned(second)

    def statistic(i: NDArray[Any], j: NDArray[Any], axis: int = -1) -> NDArray[Any]:
        ratios: NDArray[Any] = _medians(a, i, axis) / _medians(b, j, axis)
        return ratios

    units = (np.arange(len(a)), np.arange(len(b)))
    if interleaved:
        units = (units[0], units[0])
    result = stats.bootstrap(
        units,
        statistic,
        paired=interleaved,
        vectorized=True,
        n_resamples=resamples,
        batch=1000,
        confidence_level=_expanded_level(min(len(a), len(b))),
        method="percentile",
        rng=np.random.default_rng(_SEED),
    )
    low, high = result.confidence_interval
    return Ratio(value, min(float(low), value), max(float(high), value), interleaved=interleaved)


def block_spread(blocks: Sequence[ArrayLike]) -> float:
    """How far the blocks' medians lie apart: (largest − smallest) / median of them."""
    medians = [float(np.median(np.asarray(block))) for block in blocks]
    return (max(medians) - min(medians)) / float(np.median(medians))


def _t_interval(first: Sequence[ArrayLike], second: Sequence[ArrayLike], *, paired: bool) -> float:
    """Half the width of Student's interval for log(first / second); Welch's where the blocks are not paired."""
    from scipy import stats

    a, b = ([math.log(float(np.median(np.asarray(block)))) for block in blocks] for blocks in (first, second))
    found = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=False)
    low, high = found.confidence_interval(CONFIDENCE)
    return float(high - low) / 2 if math.isfinite(high - low) else 0.0


def _pooled_median(blocks: Sequence[ArrayLike]) -> float:
    return percentiles(blocks).p50_ns


def _thinned(blocks: Sequence[ArrayLike]) -> NDArray[np.float64]:
    """(blocks, points): each block as evenly spaced quantiles, so that a resample's median costs the same however fast
    the model is.
    """
    grid = (np.arange(_POINTS_PER_BLOCK) + 0.5) / _POINTS_PER_BLOCK
    return np.stack([np.quantile(np.asarray(block, dtype=np.float64), grid) for block in blocks])


def _medians(blocks: NDArray[np.float64], resamples: NDArray[Any], axis: int) -> NDArray[Any]:
    """Median over the blocks that each resample (indices along ``axis``) drew."""
    indices = np.moveaxis(resamples, axis, -1)
    drawn = blocks[indices]
    medians: NDArray[Any] = np.median(drawn.reshape(*indices.shape[:-1], -1), axis=-1)
    return medians


def _expanded_level(count: int) -> float:
    """Level at which a percentile interval over ``count`` units is as wide as the t interval of ``CONFIDENCE``."""
    from scipy import stats

    tail = (1 - CONFIDENCE) / 2
    quantile = math.sqrt(count / (count - 1)) * float(stats.t.ppf(1 - tail, count - 1))
    return 1 - 2 * float(stats.norm.sf(quantile))
