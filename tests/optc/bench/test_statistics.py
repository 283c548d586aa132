from __future__ import annotations

import math

import numpy as np
import pytest

from optc.bench.statistics import FEW_RESAMPLES, RESAMPLES, block_spread, percentiles, ratio_of_medians


def _blocks(generator: np.random.Generator, scale: float, drift: np.ndarray, queries: int = 200) -> list[np.ndarray]:
    """Latencies that scatter between queries (5 %), between blocks (2 %), and with a drift common to a round."""
    block = drift * np.exp(generator.normal(0, 0.02, len(drift)))
    return [scale * level * np.exp(generator.normal(0, 0.05, queries)) for level in block]


def test_percentiles_are_numpys_over_all_blocks() -> None:
    blocks = [[30, 10, 20], [50, 40], [1000]]
    result = percentiles(blocks)
    pooled = [10, 20, 30, 40, 50, 1000]
    assert (result.p50_ns, result.p90_ns, result.p99_ns) == pytest.approx(np.percentile(pooled, [50, 90, 99]))
    assert result.count == 6
    assert "pooled" in result.method


@pytest.mark.parametrize("blocks", [2, 3, 5, 6, 8])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(blocks: int) -> None:
    generator, few = np.random.default_rng(7), FEW_RESAMPLES if blocks > 5 else RESAMPLES  # where they take long
    covered = 0
    for _ in range(60):
        drift = np.exp(generator.normal(0, 0.1, blocks))
        pair = _blocks(generator, 0.8, drift), _blocks(generator, 1.0, drift)
        ratio = ratio_of_medians(*pair, interleaved=True, resamples=few)
        covered += ratio.low <= 0.8 <= ratio.high
    assert covered >= 51  # 95 % of 60 is 57; fewer than 51 happens once in 200 runs of a correct method


def test_pairing_removes_what_slowed_both() -> None:
    generator = np.random.default_rng(1)
    drift = np.array([1.0, 1.0, 3.0, 1.5, 0.7])
    first, second = _blocks(generator, 0.8, drift), _blocks(generator, 1.0, drift)
    paired = ratio_of_medians(first, second, interleaved=True)
    apart = ratio_of_medians(first, second, interleaved=False)
    assert paired.outcome == "faster"
    assert apart.outcome == "no difference"
    assert paired.value == apart.value == pytest.approx(np.median(first) / np.median(second))


def test_outcomes() -> None:
    generator = np.random.default_rng(2)
    slow, fast = (_blocks(generator, scale, np.ones(5)) for scale in (2.0, 1.0))
    assert ratio_of_medians(slow, fast, interleaved=True).outcome == "slower"
    assert ratio_of_medians(fast, slow, interleaved=True).outcome == "faster"
    same = ratio_of_medians(fast, fast, interleaved=True)
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)
    assert same.outcome == "no difference"


def test_blocks_weigh_the_same_however_many_queries_they_hold() -> None:
    generator = np.random.default_rng(3)
    uneven = [generator.normal(1.0, 0.01, count) for count in (50, 400, 90, 1000, 30)]
    ratio = ratio_of_medians(uneven, uneven[::-1], interleaved=False)
    assert ratio.low <= 1 <= ratio.high
    assert ratio.high - ratio.low < 0.02


def test_one_block_says_nothing_of_the_spread() -> None:
    ratio = ratio_of_medians([[2, 2]], [[1, 1]], interleaved=True)
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 0.0, math.inf)
    assert ratio.outcome == "no difference"


def test_spread_is_relative_to_the_middle_block() -> None:
    assert block_spread([[10, 10], [11, 11], [9, 9]]) == pytest.approx(0.2)
    assert block_spread([[10]]) == 0.0
