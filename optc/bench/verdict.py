"""Why LoadGen calls a run INVALID, in plain words, and the setting that would mend it."""

from __future__ import annotations

from dataclasses import dataclass

from optc.bench.results import CandidateResult
from optc.bench.summary import LoadGenSummary

OFFICIAL = "--official"


def explain(summary: LoadGenSummary, queries: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reasons and mends, one of each for every requirement that was not met; both empty for a valid run.

    Args:
        queries: how many LoadGen issued.
    """
    scenario, asked = summary.scenario.replace(" ", ""), summary.parameters
    reasons, mends = [], []
    unmet = " ".join(summary.reasons)
    if "Performance constraints" in unmet:
        bound = asked.get("target_latency (ns)", 0) / 1e6
        reasons.append(f"its latency exceeds the bound of {bound:g} ms more often than it may")
        mends.append(f"lower *.{scenario}.target_qps or raise *.{scenario}.target_latency in --user-conf")
        return tuple(reasons), tuple(mends)  # what else is unmet follows from it
    if "Min duration" in unmet:
        seconds = asked.get("min_duration (ms)", 0) / 1000
        # Not target_latency of the streams, which has no parts of a millisecond.
        key = "target_qps" if scenario in ("Server", "Offline") else "min_query_count"
        reasons.append(f"it ended before the {seconds:g} s it had to last: LoadGen had made too few queries beforehand")
        mends.append(f"raise *.{scenario}.{key} in --user-conf, so that LoadGen makes more")
    if "Min queries" in unmet:
        least = int(asked.get("min_query_count", 0))
        reasons.append(f"it ended after {queries} of at least {least} queries")
        mends.append(f"lower *.{scenario}.target_qps in --user-conf: too many queries were waiting")
    if "Early stopping" in unmet:
        more = _number_after("run at least", unmet)
        wants = queries + more if more is not None else _number_after("at least", unmet)
        reasons.append(f"{queries} queries are too few to vouch for its percentile: LoadGen wants {wants}")
        mends.append(f"{OFFICIAL}, or *.{scenario}.min_query_count = {wants} in --user-conf")
    if not summary.valid and not reasons:
        reasons.append(unmet or "LoadGen gave no reason")
        mends.append("see mlperf_log_detail.txt")
    return tuple(reasons), tuple(mends)


@dataclass(frozen=True)
class Verdict:
    """LoadGen's word on a candidate: ``reason`` and ``mend`` are empty where all is VALID."""

    valid: bool
    reason: str = ""
    mend: str = ""


def of_blocks(result: CandidateResult) -> Verdict:
    """The verdict on a candidate measured in blocks, each a run of LoadGen's: VALID if all of them are."""
    if result.error is not None:
        return Verdict(False, result.error)
    bad = [block for block in result.blocks if not block.loadgen.valid]
    if not bad:
        return Verdict(bool(result.blocks))
    reasons, _ = explain(bad[0].loadgen, len(bad[0].latencies_ns))
    # Blocks have no part in --user-conf.
    return Verdict(False, f"{len(bad)} of {len(result.blocks)} runs: {'; '.join(reasons)}", OFFICIAL)


def _number_after(words: str, text: str) -> int | None:
    _, found, rest = text.partition(words)
    digits = "".join(rest.split()[:1]) if found else ""
    return int(digits) if digits.isdigit() else None
