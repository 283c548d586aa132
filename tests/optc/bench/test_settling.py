"""Further blocks for optimized candidates that are close to the fastest one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from optc import Runner, Target
from optc.bench.loadgen import SingleStreamRun
from optc.bench.measure import FAR, NEAR_BLOCKS, SETTLING_BLOCKS, SETTLING_QUERIES, WAYS_BLOCKS, measure
from optc.bench.results import Candidate, Measurement
from optc.bench.summary import LoadGenSummary

Arrays = tuple[np.ndarray, ...]
TIED = ((1, 3), (3, 1))
"""Milliseconds in one block and in the next, of two that nothing tells apart."""


class Told(Runner):
    """Is said to take as long as it is told to."""

    provider, precision = "test runtime", "float32"

    def __init__(self, seconds: Callable[[], float]) -> None:
        self.seconds = seconds

    def __call__(self, *inputs: np.ndarray) -> Arrays:
        return inputs


@pytest.fixture(autouse=True)
def _as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoadGen and the clock are left out: which blocks follow from which latencies is what is tested."""
    noise = np.random.default_rng(0)

    def block(runner: Told, samples: object, queries: int, **_: object) -> SingleStreamRun:
        latency = round(runner.seconds() * 1e9 * noise.uniform(0.999, 1.001))
        summary = LoadGenSummary("SingleStream", True, (), {}, latency, latency, latency)
        return SingleStreamRun(np.full(min(queries, 20), latency), summary, 0, None)

    monkeypatch.setattr("optc.bench.measure.single_stream", block)


def settled(
    candidates: list[Candidate],
    optimized: tuple[str, ...],
    opened: Counter[str],
    measured: Counter[str],
    *,
    limit_seconds: float = 90.0,
    blocks: int = 4,
) -> Measurement:
    """Measure candidates, counting how often each is opened and gets a block."""

    def progress(text: str) -> None:
        what, _, rest = text.partition(" ")
        (opened if what == "opening" else measured)[rest.partition(",")[0]] += 1

    return measure(
        candidates,
        [(np.ones((1, 4), np.float32),)],
        Target(threads=1),
        optimized=optimized,
        blocks=blocks,
        block_seconds=0.025,
        limit_seconds=limit_seconds,
        together=True,
        progress=progress,
    )


def test_candidates_that_are_not_told_apart_get_further_blocks() -> None:
    opened, measured = Counter[str](), Counter[str]()

    def twin(name: str, lead: int) -> Candidate:
        """Three times as fast as its twin in one block, and in the next the other way round."""
        return Candidate(name, "", True, lambda: Told(lambda: 0.003 if (measured[name] + lead) % 2 else 0.001))

    candidates = [
        twin("first twin", 0),
        twin("second twin", 1),
        Candidate("slow", "", True, lambda: Told(lambda: 0.05)),
        Candidate("baseline", "", False, lambda: Told(lambda: 0.03)),
    ]
    result = settled(candidates, ("first twin", "second twin", "slow"), opened, measured)
    twins = 4 + SETTLING_BLOCKS
    assert min(FAR) <= measured.pop("slow") < 4, "it gets more only where they are too unsteady to tell it from them"
    assert measured == {"first twin": twins, "second twin": twins, "baseline": 4}
    assert {name: len(result[name].blocks) for name in measured} == measured
    assert opened["first twin"] == opened["second twin"] == 1 + SETTLING_BLOCKS
    assert result.ratio is not None
    assert result.ratio.outcome == "faster"
    assert result.baseline == "baseline"


def test_further_blocks_of_slow_candidates_hold_several_queries() -> None:
    measured = Counter[str]()

    def twin(name: str, lead: int) -> Candidate:
        return Candidate(name, "", True, lambda: Told(lambda: 0.03 if (measured[name] + lead) % 2 else 0.02))

    result = settled(
        [twin("first twin", 0), twin("second twin", 1)], ("first twin", "second twin"), Counter(), measured
    )
    queries = [len(block.latencies_ns) for block in result["first twin"].blocks]
    assert queries[1:4] == [1] * 3
    assert set(queries[4:]) == {SETTLING_QUERIES}


def test_the_further_behind_the_fewer_blocks() -> None:
    candidates = [
        Candidate("fast", "", True, lambda: Told(lambda: 0.02)),
        Candidate("behind", "", True, lambda: Told(lambda: 0.0275)),
        Candidate("far behind", "", True, lambda: Told(lambda: 0.08)),
    ]
    measured = Counter[str]()
    settled(candidates, ("fast", "behind", "far behind"), Counter(), measured, blocks=5)
    assert measured == {"fast": 5, "behind": 3, "far behind": 2}


def test_what_is_far_behind_and_not_told_apart_goes_on() -> None:
    measured = Counter[str]()
    seconds = (0.07, 0.035)
    candidates = [
        Candidate("fast", "", True, lambda: Told(lambda: 0.02)),
        Candidate("unsteady", "", True, lambda: Told(lambda: seconds[(measured["unsteady"] + 1) % 2])),
    ]
    settled(candidates, ("fast", "unsteady"), Counter(), measured, blocks=4)
    assert measured["unsteady"] > min(FAR), "3.5 and 1.75 times: two blocks leave the interval beyond 1"


def test_what_is_near_the_fastest_is_opened_anew() -> None:
    openings = 0

    def unlucky() -> Runner:
        """Slower by a twentieth as opened first, faster by a fifth afterwards."""
        nonlocal openings
        openings += 1
        seconds = 0.0105 if openings == 1 else 0.008
        return Told(lambda: seconds)

    candidates = [
        Candidate("unlucky", "", True, unlucky),
        Candidate("lucky", "", True, lambda: Told(lambda: 0.01)),
        Candidate("far", "", True, lambda: Told(lambda: 0.02)),
        Candidate("baseline", "", False, lambda: Told(lambda: 0.03)),
    ]
    opened, measured = Counter[str](), Counter[str]()
    result = settled(candidates, ("unlucky", "lucky", "far"), opened, measured, blocks=3)
    p50 = {name: found.p50_ns for name in measured if (found := result[name].percentiles)}
    assert p50["unlucky"] < p50["lucky"] < p50["far"]
    assert opened["unlucky"] >= 1 + NEAR_BLOCKS
    assert opened["far"] == opened["baseline"] == 1


def unsteady(name: str, milliseconds: tuple[float, ...], measured: Counter[str], instead_of: str = "") -> Candidate:
    """As long as the second number in its first block, as the next one in the next, and so on in turn."""
    return Candidate(
        name,
        "",
        True,
        lambda: Told(lambda: milliseconds[measured[name] % len(milliseconds)] / 1000),
        instead_of=instead_of,
    )


def test_only_the_fastest_of_the_other_ways_goes_on_against_the_one_without_options() -> None:
    opened, measured = Counter[str](), Counter[str]()
    candidates = [
        unsteady("plain", (11, 11, 11), measured),
        unsteady("fast way", (18, 8, 8), measured, "plain"),
        unsteady("slow way", (10, 12, 12), measured, "plain"),
    ]
    settled(candidates, ("plain", "fast way", "slow way"), opened, measured)
    assert opened == {"plain": 1 + SETTLING_BLOCKS, "fast way": 1 + SETTLING_BLOCKS, "slow way": 1 + WAYS_BLOCKS}


def test_what_is_slow_to_open_gets_several_blocks_each_time() -> None:
    opened, measured = Counter[str](), Counter[str]()

    def slow_to_open(candidate: Candidate) -> Candidate:
        def open_() -> Runner:
            time.sleep(0.1)
            return candidate.open()

        return replace(candidate, open=open_)

    names = ("first", "second")
    candidates = [slow_to_open(unsteady(name, numbers, measured)) for name, numbers in zip(names, TIED, strict=True)]
    settled(candidates, names, opened, measured)
    for name in names:
        assert measured[name] == 4 + SETTLING_BLOCKS
        assert 2 <= opened[name] - 1 <= SETTLING_BLOCKS // 3, "four blocks of 0.025 s take as long as opening it"


def test_settling_ends_with_the_time() -> None:
    candidates = [Candidate(name, "", True, lambda: Told(lambda: 0.001)) for name in ("twin", "other twin")]
    opened = Counter[str]()
    result = settled(candidates, ("twin", "other twin"), opened, Counter(), limit_seconds=0.0)
    assert [len(each.blocks) for each in result.results] == [2, 2]
    assert set(opened.values()) == {1}
