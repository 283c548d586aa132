"""Reading ``mlperf_log_summary.txt``, LoadGen's own account of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from optc.errors import MeasurementError

_PERCENTILE = re.compile(r"^(\d+\.\d+) percentile latency \(ns\)\s*:\s*(\d+)$", re.MULTILINE)
_ESTIMATE = re.compile(r"^ \* Early stopping (\d+)th percentile estimate\s*:\s*(\d+)$", re.MULTILINE)
_STATISTIC = re.compile(r"^(Min|Max|Mean) latency \(ns\)\s*:\s*(\d+)$", re.MULTILINE)
_RATE = re.compile(r"^(?:Completed samples|Samples) per second\s*: (\S+)$", re.MULTILINE)
_PARAMETER = re.compile(r"^(\w+(?: \(\w+\))?)\s*: (\d[\d.e+]*)$", re.MULTILINE)
PARAMETERS = ("target_qps", "target_latency (ns)", "min_duration (ms)", "min_query_count", "samples_per_query")
_REQUIREMENT = re.compile(r"^\s+(.+?) satisfied\s*: NO$", re.MULTILINE)


@dataclass(frozen=True)
class LoadGenSummary:
    """LoadGen's verdict and latency statistics, harness included.

    Attributes:
        scenario: ``"SingleStream"``, ``"MultiStream"``, ``"Server"`` or ``"Offline"``.
        valid: LoadGen's own verdict.
        reasons: why it is not valid, in LoadGen's words; empty if it is.
        percentiles_ns: by percentile as LoadGen writes it (``"50.00"``, ``"90.00"``, … ``"99.90"``).
        min_ns, mean_ns, max_ns: over all queries.
        estimates_ns: of the percentiles (``"90"``, ``"99"``), where enough queries ran: what LoadGen vouches for by its
            early-stopping criterion, which is never lower. MLPerf's result of SingleStream and MultiStream.
        samples_per_second: throughput, in the scenarios that have one (Offline, Server).
        parameters: what LoadGen says it ran with, such as ``"min_query_count"`` and ``"target_latency (ns)"``.
    """

    scenario: str
    valid: bool
    reasons: tuple[str, ...]
    percentiles_ns: dict[str, int]
    min_ns: int
    mean_ns: int
    max_ns: int
    samples_per_second: float | None = None
    parameters: Mapping[str, float] = field(default_factory=dict)
    estimates_ns: Mapping[str, int] = field(default_factory=dict)


def read_summary(path: Path) -> LoadGenSummary:
    """Parse a summary file.

    Raises:
        MeasurementError: LoadGen left no summary or one that says nothing of the run.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise MeasurementError(f"LoadGen left no summary at {path}: {error.strerror}", "is the disk full?") from error
    verdict = re.search(r"^Result is : (\w+)$", text, re.MULTILINE)
    scenario = re.search(r"^Scenario : (.+)$", text, re.MULTILINE)
    statistics = {name: int(value) for name, value in _STATISTIC.findall(text)}
    if verdict is None or scenario is None or len(statistics) < 3:
        raise MeasurementError(f"LoadGen's summary at {path} is incomplete", "is the disk full?")
    valid = verdict[1] == "VALID"
    return LoadGenSummary(
        scenario=scenario[1].strip(),
        valid=valid,
        reasons=() if valid else _reasons(text),
        percentiles_ns={name: int(value) for name, value in _PERCENTILE.findall(text)},
        min_ns=statistics["Min"],
        mean_ns=statistics["Mean"],
        max_ns=statistics["Max"],
        samples_per_second=float(rate[1]) if (rate := _RATE.search(text)) else None,
        parameters={name: float(value) for name, value in _PARAMETER.findall(text) if name in PARAMETERS},
        estimates_ns={name: int(value) for name, value in _ESTIMATE.findall(text)},
    )


def _reasons(text: str) -> tuple[str, ...]:
    """The requirements not met, and the starred remarks LoadGen adds on them."""
    verdict = text[text.index("Result is :") :].partition("=====")[0]
    unmet = [f"{requirement.strip()}: not satisfied" for requirement in _REQUIREMENT.findall(verdict)]
    remarks = [line.strip(" *") for line in verdict.splitlines() if line.startswith(" * ")]
    return (*unmet, *remarks)
