from __future__ import annotations

import pytest

from optc.bench.results import Block, Candidate, CandidateResult
from optc.bench.summary import LoadGenSummary
from optc.bench.verdict import explain, of_blocks
from optc.lowering.backend import Runner


def _summary(scenario: str, *reasons: str, **parameters: float) -> LoadGenSummary:
    named = {key.replace("_ns", " (ns)").replace("_ms", " (ms)"): value for key, value in parameters.items()}
    return LoadGenSummary(scenario, not reasons, reasons, {}, 1, 1, 1, None, named)


@pytest.mark.parametrize(
    ("summary", "reason", "mend"),
    [
        (
            _summary(
                "Server",
                "Performance constraints: not satisfied",
                "Min queries: not satisfied",
                "Early stopping: not satisfied",
                "Run unsuccessful.",
                target_latency_ns=1.5e7,
            ),
            "its latency exceeds the bound of 15 ms more often than it may",
            "lower *.Server.target_qps or raise *.Server.target_latency in --user-conf",
        ),
        (
            _summary("Single Stream", "Early stopping: not satisfied", "Need to process at least 64 queries for"),
            "20 queries are too few to vouch for its percentile: LoadGen wants 64",
            "--official, or *.SingleStream.min_query_count = 64 in --user-conf",
        ),
        (
            _summary("Server", "Early stopping: not satisfied", "Would need to run at least 80 more queries,"),
            "20 queries are too few to vouch for its percentile: LoadGen wants 100",
            "--official, or *.Server.min_query_count = 100 in --user-conf",
        ),
        (
            _summary("Offline", "Min duration: not satisfied", min_duration_ms=600_000),
            "it ended before the 600 s it had to last: LoadGen had made too few queries beforehand",
            "raise *.Offline.target_qps in --user-conf, so that LoadGen makes more",
        ),
        (
            _summary("SingleStream", "Min duration: not satisfied", min_duration_ms=2000),
            "it ended before the 2 s it had to last: LoadGen had made too few queries beforehand",
            "raise *.SingleStream.min_query_count in --user-conf, so that LoadGen makes more",
        ),
        (
            _summary("Server", "Min queries: not satisfied", min_query_count=700),
            "it ended after 20 of at least 700 queries",
            "lower *.Server.target_qps in --user-conf: too many queries were waiting",
        ),
        (_summary("Offline", "Something new"), "Something new", "see mlperf_log_detail.txt"),
    ],
)  # fmt: skip
def test_each_reason_is_said_plainly_with_what_mends_it(summary: LoadGenSummary, reason: str, mend: str) -> None:
    assert explain(summary, 20) == ((reason,), (mend,))


def test_a_valid_run_needs_no_words() -> None:
    assert explain(_summary("Offline"), 20) == ((), ())


def _result(*summaries: LoadGenSummary, error: str | None = None) -> CandidateResult:
    def never() -> Runner:
        raise AssertionError

    blocks = tuple(Block((1, 2, 3), 0, summary) for summary in summaries)
    return CandidateResult.of(Candidate("m", "", False, never), "", "", 0.0, blocks, error)


def test_blocks_are_valid_if_all_are() -> None:
    good, bad = (
        _summary("SingleStream"),
        _summary("SingleStream", "Early stopping: not satisfied", "at least 64 queries"),
    )
    assert of_blocks(_result(good, good)).valid
    verdict = of_blocks(_result(good, bad))
    assert not verdict.valid
    assert verdict.reason.startswith("1 of 2 runs: 3 queries are too few")
    assert verdict.mend == "--official"
    assert of_blocks(_result(good, error="failed on sample 3")).reason == "failed on sample 3"
    assert not of_blocks(_result()).valid
