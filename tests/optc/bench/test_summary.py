from __future__ import annotations

from pathlib import Path

import pytest

from optc.bench.summary import read_summary
from optc.errors import MeasurementError

# As LoadGen 6.0 wrote it, for a run cut short.
_INVALID = """\
================================================
MLPerf Results Summary
================================================
SUT name : PyFastSUT
Scenario : SingleStream
Mode     : PerformanceOnly
90.0th percentile latency (ns) : 10218314
Result is : INVALID
  Min duration satisfied : NO
  Min queries satisfied : Yes
  Early stopping satisfied: NO
Recommendations:
 * Increase expected QPS so the loadgen pre-generates a larger (coalesced) query.
Early Stopping Result:
 * Only processed 10 queries.
 * Need to process at least 64 queries for early stopping.

================================================
Additional Stats
================================================
QPS w/ loadgen overhead         : 98.29
QPS w/o loadgen overhead        : 98.34

Min latency (ns)                : 10113529
Max latency (ns)                : 10218314
Mean latency (ns)               : 10168425
50.00 percentile latency (ns)   : 10179416
90.00 percentile latency (ns)   : 10218314
99.90 percentile latency (ns)   : 10218314
"""


def test_reads_verdict_reasons_and_statistics(tmp_path: Path) -> None:
    path = tmp_path / "mlperf_log_summary.txt"
    path.write_text(_INVALID)
    summary = read_summary(path)
    assert not summary.valid
    assert summary.reasons == (
        "Min duration: not satisfied",
        "Early stopping: not satisfied",
        "Increase expected QPS so the loadgen pre-generates a larger (coalesced) query.",
        "Only processed 10 queries.",
        "Need to process at least 64 queries for early stopping.",
    )
    assert summary.percentiles_ns == {"50.00": 10179416, "90.00": 10218314, "99.90": 10218314}
    assert (summary.min_ns, summary.mean_ns, summary.max_ns) == (10113529, 10168425, 10218314)


def test_a_missing_or_truncated_summary_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mlperf_log_summary.txt"
    with pytest.raises(MeasurementError, match="no summary"):
        read_summary(path)
    path.write_text(_INVALID[: _INVALID.index("Min latency")])
    with pytest.raises(MeasurementError, match="incomplete"):
        read_summary(path)
