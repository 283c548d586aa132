from __future__ import annotations

from optc.report.words import times


def test_a_ratio_near_one_is_not_rounded_to_one() -> None:
    assert (times(1.04), times(2.4), times(1234.5)) == ("1.04 times", "2.4 times", "1,234 times")
