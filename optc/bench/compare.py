"""Comparing measured targets with the first of them: a ratio of latencies, how sure it is, and what to beware of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optc.bench.paired import block_ratio
from optc.bench.results import CandidateResult
from optc.bench.statistics import Ratio
from optc.bench.surroundings import differences
from optc.errors import MeasurementError


@dataclass(frozen=True)
class Contender:
    """What stands for one target.

    Attributes:
        target: what the user calls it.
        result: its fastest candidate.
        saved: whether it was read from a saved run, not measured now.
        failed: candidates that were not measured to the end, with the reason: one of them may have been faster.
    """

    target: str
    result: CandidateResult
    saved: bool = False
    failed: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """What makes its number doubtful, behind its name."""
        return [f"{self.target}: {warning}" for warning in (*self.failed, *self.result.warnings)]


@dataclass(frozen=True)
class Comparison:
    """One target beside the first.

    Attributes:
        ratio: latency of ``target`` over that of ``base``, from the medians of their blocks.
        interleaved: whether their blocks took turns. If not, they were measured at different times, and what changed
            on the machine in between is in the ratio but not in its interval.
        warnings: what makes either number doubtful.
    """

    target: str
    base: str
    ratio: Ratio
    interleaved: bool
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """One line for people."""
        value, low, high = self.ratio.value, self.ratio.low, self.ratio.high
        numbers = f"{value:.3f} times [{low:.3f}, {high:.3f}] the latency of {self.base}"
        if self.ratio.outcome == "no difference":
            drift = "" if self.ratio.low <= 1 <= self.ratio.high else f" ({self.ratio.doubt})"
            return f"{self.target}: {numbers}: no difference shown{drift}"
        return f"{self.target}: {numbers}: {self.ratio.outcome}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the outcome and the verdict included."""
        return {**asdict(self), "outcome": self.ratio.outcome, "verdict": self.verdict}


def contender(target: str, results: Sequence[CandidateResult], *, saved: bool = False) -> Contender:
    """The fastest of a target's candidates that was measured to the end; what returned NaN only where all did.

    Raises:
        MeasurementError: none was; says why.
    """
    measured = [result for result in results if result.percentiles is not None and result.error is None]
    if not measured:
        why = "; ".join(f"{result.name}: {result.error}" for result in results) or "it holds no latencies"
        raise MeasurementError(f"nothing of '{target}' was measured: {why}", "compare something else")
    measured = [result for result in measured if not result.nonfinite_queries] or measured
    failed = tuple(f"{result.name} was not measured: {result.error}" for result in results if result.error is not None)
    return Contender(target, min(measured, key=_p50), saved, failed)


def comparisons(contenders: Sequence[Contender]) -> list[Comparison]:
    """Each contender but the first beside the first."""
    base, *others = contenders
    return [_compare(base, other) for other in others]


def _compare(base: Contender, other: Contender) -> Comparison:
    interleaved = not base.saved and not other.saved
    ratio = block_ratio(other.result.latencies_ns, base.result.latencies_ns, paired=interleaved)
    return Comparison(other.target, base.target, ratio, interleaved, (*base.warnings, *other.warnings))


def refuse_unless_alike(named: Sequence[tuple[str, Mapping[str, Any]]], forced: bool) -> list[str]:
    """Compare surroundings, each with the name of what was measured in them, with the first.

    Returns:
        What differs, one line for each; empty if nothing does. Anything here was forced.

    Raises:
        MeasurementError: something differs and it was not forced.
    """
    (first, base), *others = named
    found = []
    for name, each in others:
        if changed := differences(base, each):
            found.append(f"'{first}' and '{name}' were not measured under the same conditions: {'; '.join(changed)}")
    if found and not forced:
        raise MeasurementError(found[0], "measure both again here, or give --force to compare all the same")
    return found


def _p50(result: CandidateResult) -> float:
    return result.percentiles.p50_ns if result.percentiles else float("inf")
