from __future__ import annotations

import math

import numpy as np
import pytest

from optc.bench.paired import block_ratio


def _blocks(medians: list[float]) -> list[np.ndarray]:
    return [np.array([0.9, 1.0, 1.1]) * median for median in medians]


def test_the_ratio_is_the_geometric_mean_over_pairs() -> None:
    ratio = block_ratio(_blocks([2, 8, 18, 2, 8, 18]), _blocks([2, 4, 6, 2, 4, 6]), paired=True)
    assert ratio.value == pytest.approx((1 * 2 * 3) ** (1 / 3))
    assert 1 <= ratio.low < ratio.value < ratio.high <= 3
    assert ratio.confidence == 0.99


def test_what_slowed_both_cancels_in_pairs_only() -> None:
    drift = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5]
    first, second = _blocks([0.9 * value for value in drift]), _blocks(drift)
    paired = block_ratio(first, second, paired=True)
    assert (paired.value, paired.low, paired.high) == pytest.approx((0.9, 0.9, 0.9))
    assert paired.outcome == "faster"
    assert block_ratio(first, second, paired=False).outcome == "no difference"


def test_a_block_counts_once_however_many_queries_it_has() -> None:
    few, many = _blocks([1.0] * 6), [np.full(1000, 1.0), *_blocks([2.0] * 5)]
    assert block_ratio(many, few, paired=True).value == pytest.approx(2 ** (5 / 6))


def test_few_blocks_use_students_interval_and_one_says_nothing() -> None:
    # scipy.stats.ttest_1samp(log([1, 2, 4]), 0).confidence_interval(0.99)
    three = block_ratio(_blocks([1, 2, 4]), _blocks([1, 1, 1]), paired=True)
    assert (math.log(three.low), math.log(three.high)) == pytest.approx((-3.278663, 4.664957), abs=1e-5)
    one = block_ratio(_blocks([2]), _blocks([1]), paired=True)
    assert (one.value, one.low, one.high) == (2.0, 0.0, math.inf)


def test_blocks_beyond_the_others_are_left_out_in_pairs_and_used_otherwise() -> None:
    first, second = _blocks([1, 1, 1, 100]), _blocks([1, 1, 1])
    assert block_ratio(first, second, paired=True).value == pytest.approx(1)
    assert block_ratio(first, second, paired=False).value > 2


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("blocks", [4, 10])
def test_of_a_model_with_itself_few_comparisons_show_a_difference(paired: bool, blocks: int) -> None:
    """Seeded, so that it cannot fail by chance: noise with heavy tails, as a busy machine gives."""
    generator = np.random.default_rng(0)
    medians = np.exp(0.08 * generator.standard_t(4, (100, 2, blocks)))
    shown = sum(
        block_ratio(_blocks(list(one)), _blocks(list(other)), paired=paired).outcome != "no difference"
        for one, other in medians
    )
    assert shown <= 3
    slower = sum(
        block_ratio(_blocks(list(1.6 * one)), _blocks(list(other)), paired=paired).outcome == "slower"
        for one, other in medians
    )
    assert slower > (80 if blocks == 10 else 30)
