"""What a run of ``optimize`` has to say, as data."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from optc.bench.results import fastest
from optc.bench.statistics import ratio_of_medians
from optc.budget import exceeds
from optc.passmanager.alternatives import QUANT
from optc.passmanager.contract import Pass, PassRecord
from optc.paths import encodable
from optc.program import ModelInfo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from optc.bench.choice import Outcome
    from optc.bench.results import Measurement


@dataclass(frozen=True)
class Accuracy:
    """The task metric before and after, or why there is none.

    Attributes:
        before, after: top-1 accuracy or the caller's metric, of the captured model and of the lowered one.
        data: what it was evaluated on.
        reason: why it could not be measured; then ``before`` and ``after`` are ``None``.
        metric: what it is called.
    """

    before: float | None = None
    after: float | None = None
    data: str = ""
    reason: str = ""
    metric: str = "accuracy"

    @property
    def drop(self) -> float | None:
        """Percentage points that were lost; negative if the metric rose."""
        return None if self.before is None or self.after is None else 100 * (self.before - self.after)


@dataclass(frozen=True)
class BudgetOutcome:
    """Whether the metric stayed within ``max_drop`` percentage points, and what it took.

    Attributes:
        quantized: whether quantization, or another pass that changes the outputs, is part of what was kept.
        tried: what was given up because it lost more.
    """

    max_drop: float
    quantized: bool
    tried: tuple[str, ...]
    text: str

    @classmethod
    def of(
        cls,
        max_drop: float | None,
        accuracy: Accuracy,
        asked: Pass,
        history: Sequence[PassRecord],
        tried: Sequence[str],
    ) -> BudgetOutcome | None:
        """What became of the budget; ``None`` without one."""
        if max_drop is None:
            return None
        approximate = {each.name for each in asked.leaves() if not each.numerics.exact}
        did = {record.name for record in history if record.modified} & approximate
        gone = approximate - did if not did else {QUANT} & (approximate - did)
        quantized = bool(did) and not gone
        if accuracy.drop is None:
            return cls(max_drop, quantized, tuple(tried), f"NOT checked: accuracy {accuracy.reason}")
        lost = f"{accuracy.drop:.2f} points of {accuracy.metric} lost, {max_drop:g} allowed ({accuracy.data})"
        if exceeds(accuracy.drop, max_drop):
            lost = f"NOT kept: {lost}"
        if gone:
            names = ", ".join(sorted(gone))
            text = "; ".join([f"NOT quantized: nothing that {names} can do keeps the budget", *tried, lost])
        else:
            text = "; ".join([lost, *tried])
        return cls(max_drop, quantized, tuple(tried), text)


@dataclass(frozen=True)
class Report:
    """Everything a run found out, JSON-ready through :meth:`to_dict`.

    Attributes:
        passes: one record per leaf pass that ran.
        model_bytes: constants of the captured model; ``file_bytes``: all runtime files written.
        backends: where the backend was chosen by measuring, what became of each; the kept one first.
        budget: what became of the accuracy budget, if there was one.
        calibration: where activation ranges came from; empty if no data was offered.
        lowering: what the backend had to say (opset, operator counts, fallbacks).
        seconds: wall time of each step.
        notes: lines the user must see.
    """

    model: ModelInfo
    passes: tuple[PassRecord, ...]
    backend: str
    provider: str
    precision: str
    model_bytes: int
    file_bytes: int
    accuracy: Accuracy
    measurement: Measurement | None
    budget: BudgetOutcome | None = None
    backends: tuple[Outcome, ...] = ()
    calibration: str = ""
    lowering: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def faster(self) -> bool:
        """Whether the result was shown to be faster than the best unquantized PyTorch."""
        ratio = self.measurement.ratio if self.measurement else None
        return ratio is not None and ratio.outcome == "faster"

    @property
    def verdict(self) -> str:
        """The last line: whether the result is faster than the best unquantized PyTorch, and what the budget took."""
        budget = f"Budget: {self.budget.text}." if self.budget else ""
        return " ".join(filter(None, (self._speed, self.own_unquantized, budget)))

    @property
    def own_unquantized(self) -> str:
        """What optc makes of the model without quantizing it, beside a quantized result; empty if nobody measured."""
        measurement = self.measurement
        if measurement is None or measurement.optimized is None or not measurement[measurement.optimized].quantized:
            return ""
        own = [each for each in measurement.results if each.name.startswith("optc ") and not each.quantized]
        best, subject = fastest(own, measurement.interleaved), measurement[measurement.optimized]
        if best is None or subject.percentiles is None:
            return ""
        ratio = ratio_of_medians(best.latencies_ns, subject.latencies_ns, interleaved=measurement.interleaved)
        return f"Unquantized, {best.name} takes {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times as long."

    @property
    def _speed(self) -> str:
        if self.measurement is None:
            return "Speed was not measured."
        ratio, baseline = self.measurement.ratio, self.measurement.baseline
        if ratio is None:
            return "No comparison: the optimized model or every baseline failed, for the reasons above."
        interval = f"[{1 / ratio.high:.2f}, {1 / ratio.low:.2f}]" if ratio.low > 0 else "[unknown]"
        measured = f"{1 / ratio.value:.2f}x {interval} the speed of the best unquantized PyTorch, {baseline}"
        match ratio.outcome:
            case "faster":
                return f"Faster: {measured}."
            case "slower":
                return f"NOT faster: {measured}. Use {baseline} where speed is all that counts."
            case _:
                return f"NOT shown to be faster: {measured}; {ratio.doubt}."

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; infinities become strings."""
        result: dict[str, Any] = jsonable(asdict(self))
        result["verdict"] = self.verdict
        return result


def jsonable(value: Any) -> Any:
    """``value`` with tuples as lists, and as text what JSON cannot hold: non-finite numbers, names that are no text."""
    if isinstance(value, dict):
        return {encodable(str(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return encodable(value)
    if value is None or isinstance(value, (int, float, bool)):
        return value
    return str(value)
