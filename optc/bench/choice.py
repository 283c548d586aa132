"""Which backend and list of passes a model is kept in: the fastest one measured, with the reason for every other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optc.bench import statistics
from optc.bench.results import CandidateResult, Measurement, fastest
from optc.errors import BackendError
from optc.lowering.lowering import Lowering
from optc.options import options_text


@dataclass(frozen=True)
class Outcome:
    """What became of one backend, or of one list of passes on it.

    Attributes:
        backend: empty where a list of passes came to nothing on any.
        reason: why it was kept or not, in plain words with the numbers.
        p50_ms: median latency; ``None`` if it was not measured.
        options: of the backend, those that it ran with besides what was asked for.
        file_bytes, seconds: size of its files and time to lower, check and load them; ``None`` if it was not lowered.
    """

    backend: str
    chosen: bool
    reason: str
    precision: str = ""
    p50_ms: float | None = None
    file_bytes: int | None = None
    seconds: float | None = None
    passes: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Backend, passes and options, as tables name it."""
        return " ".join(filter(None, (self.backend, self.passes, options_text(self.options))))


def choose(
    lowerings: Mapping[str, Lowering], left: Sequence[Outcome], measured: Measurement | None
) -> tuple[Lowering, tuple[Outcome, ...]]:
    """Keep the fastest lowering, see :func:`fastest`; ties within the noise go to it as well, and say so.

    Of several ways to run one lowering a tie goes to that without further options.

    Args:
        lowerings: by the name of their candidate in ``measured``; at least one.
        measured: may be ``None`` where there is but one.
        left: what was not lowered or not measured.

    Raises:
        BackendError: every one failed when measured.

    Returns:
        The one to keep, and every outcome: the kept one first, then by latency, then what was not run.
    """
    if measured is None:
        (only,) = lowerings.values()
        reason = "the only one that runs here and takes the model"
        kept = Outcome(only.backend.name, True, reason, only.precision, None, only.bytes, only.seconds, only.passes)
        return only, (kept, *left)
    results = [measured[name] for name in lowerings]
    best = fastest(results, measured.interleaved)
    if best is None:
        reasons = "; ".join(f"{result.name}: {result.error}" for result in results)
        raise BackendError(f"everything that was lowered failed when measured: {reasons}")
    ranked = sorted(results, key=lambda result: (result is not best, _p50(result)))
    lowest = min(map(_p50, results))
    outcomes = [_outcome(result, lowerings[result.name], best, lowest, measured.interleaved) for result in ranked]
    return lowerings[best.name], (*outcomes, *left)


def _p50(result: CandidateResult) -> float:
    return result.percentiles.p50_ns if result.percentiles and result.error is None else float("inf")


def _outcome(
    result: CandidateResult, lowering: Lowering, best: CandidateResult, lowest: float, interleaved: bool
) -> Outcome:
    return Outcome(
        backend=lowering.backend.name,
        chosen=result is best,
        reason=_reason(result, best, lowest, interleaved),
        precision=result.precision,
        p50_ms=_p50(result) / 1e6 if math.isfinite(_p50(result)) and not result.nonfinite_queries else None,
        file_bytes=lowering.bytes,
        seconds=lowering.seconds,
        passes=lowering.passes,
        options=lowering.options,
    )


def _reason(result: CandidateResult, best: CandidateResult, lowest: float, interleaved: bool) -> str:
    if result.error is not None:
        return f"failed when measured: {result.error}"
    if result is best:
        return "lowest median latency" if _p50(best) <= lowest else "no other is shown to be faster"
    ratio = statistics.ratio_of_medians(result.latencies_ns, best.latencies_ns, interleaved=interleaved)
    numbers = f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}] the latency of the one kept"
    if result.nonfinite_queries and not best.nonfinite_queries:
        return f"{result.nonfinite_queries} queries returned NaN or infinity ({numbers})"
    if ratio.outcome == "faster":
        return f"{numbers}, but not shown to be faster than without its options"
    return numbers if ratio.outcome == "slower" else f"{numbers}: no difference shown"


def rows(outcomes: Sequence[Outcome]) -> list[tuple[str, str, str, str, str, str]]:
    """The outcomes as text cells: backend, precision, p50 in ms, size in MB, seconds to make, why."""
    return [
        (
            f"{outcome.title} (kept)" if outcome.chosen else outcome.title,
            outcome.precision,
            _cell(outcome.p50_ms, ".2f"),
            _cell(outcome.file_bytes and outcome.file_bytes / 1e6, ".1f"),
            _cell(outcome.seconds, ".1f"),
            outcome.reason,
        )
        for outcome in outcomes
    ]


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
