from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from optc.bench.compare import Contender, comparisons, contender, refuse_unless_alike
from optc.bench.results import Block, Candidate, CandidateResult
from optc.bench.summary import LoadGenSummary
from optc.errors import MeasurementError
from optc.lowering.backend import Runner

SUMMARY = LoadGenSummary("SingleStream", True, (), {}, 1, 1, 1)


def _never() -> Runner:
    raise AssertionError


def _result(name: str, scale: float, seed: int, *, blocks: int = 8, error: str | None = None) -> CandidateResult:
    generator = np.random.default_rng(seed)
    drifting = [
        Block(tuple((1e6 * scale * (1 + 0.3 * i) * generator.uniform(0.99, 1.01, 50)).astype(int).tolist()), 0, SUMMARY)
        for i in range(blocks)
    ]
    return CandidateResult.of(Candidate(name, "float32", False, _never), "p", "float32", 0.1, tuple(drifting), error)


def test_blocks_that_took_turns_are_compared_in_pairs() -> None:
    """The machine slowed to a third over the blocks; in pairs, a difference of 10 % shows all the same."""
    first, other = contender("a", [_result("a", 1.0, 0)]), contender("b", [_result("b", 0.9, 1)])
    (paired,) = comparisons([first, other])
    assert paired.interleaved
    assert paired.ratio.value == pytest.approx(0.9, abs=0.02)
    assert paired.verdict.startswith(f"b: {paired.ratio.value:.3f} times [")
    assert paired.verdict.endswith("the latency of a: faster")
    saved = contender("a", [_result("a", 1.0, 0)], saved=True)
    (unpaired,) = comparisons([saved, other])
    assert not unpaired.interleaved
    assert unpaired.ratio.low < 1 < unpaired.ratio.high
    assert unpaired.verdict.endswith("no difference shown")


def test_every_target_is_compared_with_the_first_and_warnings_stay_with_their_numbers() -> None:
    found = [
        contender(name, [_result(name, scale, i)]) for i, (name, scale) in enumerate([("a", 1), ("b", 2), ("c", 1)])
    ]
    slower, same = comparisons(found)
    assert (slower.base, slower.target, slower.ratio.outcome) == ("a", "b", "slower")
    assert (same.base, same.target, same.ratio.outcome) == ("a", "c", "no difference")
    assert [warning.partition(":")[0] for warning in slower.warnings] == ["a", "b"]
    assert "unsteady" in slower.warnings[0]
    data = json.loads(json.dumps(slower.to_dict(), allow_nan=False))
    assert data["outcome"] == "slower"
    assert data["ratio"]["method"]


def test_what_did_not_take_turns_has_to_differ_by_more_than_drift() -> None:
    def steady(name: str, scale: float, *, saved: bool) -> Contender:
        blocks = [Block((round(1e6 * scale * (1 + 1e-4 * i)),) * 50, 0, SUMMARY) for i in range(10)]
        candidate = Candidate(name, "float32", False, _never)
        return contender(name, [CandidateResult.of(candidate, "p", "float32", 0.1, tuple(blocks), None)], saved=saved)

    for scale, taking_turns, apart in ((0.98, "faster", "no difference"), (1.02, "slower", "no difference"),
                                       (0.9, "faster", "faster"), (1.1, "slower", "slower")):  # fmt: skip
        for saved, outcome in ((False, taking_turns), (True, apart)):
            (found,) = comparisons([steady("a", 1.0, saved=saved), steady("b", scale, saved=False)])
            assert found.ratio.outcome == outcome


def test_a_candidate_that_failed_is_told_of() -> None:
    found = contender("m", [_result("compile-bf16", 1.0, 0, error="no compiler"), _result("eager-fp32", 2.0, 1)])
    assert found.result.name == "eager-fp32"
    assert "m: compile-bf16 was not measured: no compiler" in found.warnings
    (beside,) = comparisons([found, contender("b", [_result("b", 1.0, 2)])])
    assert "m: compile-bf16 was not measured: no compiler" in beside.warnings


def test_the_fastest_candidate_that_was_measured_to_the_end_stands_for_a_target() -> None:
    results = [_result("slow", 2, 0), _result("died", 0.1, 1, error="out of memory"), _result("fast", 1, 2)]
    assert contender("model", results).result.name == "fast"
    with pytest.raises(MeasurementError, match="nothing of 'model' was measured: died: out of memory"):
        contender("model", results[1:2])


def test_other_conditions_are_refused_and_named_unless_forced() -> None:
    here, there = {"cpu": "A", "threads": 2}, {"cpu": "B", "threads": 1}
    assert refuse_unless_alike([("x", here), ("y", dict(here))], forced=False) == []
    with pytest.raises(MeasurementError, match=r"'x' and 'y' .* CPU A and B; threads 2 and 1 — .* --force"):
        refuse_unless_alike([("x", here), ("y", there)], forced=False)
    (note,) = refuse_unless_alike([("x", here), ("y", there)], forced=True)
    assert "CPU A and B" in note


def test_what_returned_nan_stands_for_a_target_only_where_all_did() -> None:
    nan = _result("nan", 0.5, 0)
    nan = replace(nan, blocks=tuple(replace(block, nonfinite_queries=1) for block in nan.blocks))
    assert contender("t", [nan, _result("right", 1.0, 1)]).result.name == "right"
    assert contender("t", [nan]).result.name == "nan"
