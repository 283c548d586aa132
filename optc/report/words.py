"""Facts of a report in the words that every form of it uses."""

from __future__ import annotations

from collections.abc import Sequence

from optc.bench.statistics import Percentiles
from optc.passmanager.contract import PassRecord

P99_QUERIES = 100
"""From so many on there is a 99th percentile."""


def what(record: PassRecord) -> str:
    """What a pass did: ``"4 fold-batch-norm, 8 conv2d-relu"``."""
    return ", ".join(f"{count} {rule}" for rule, count in record.notes["statistics"]["applied"].items())


def distance(record: PassRecord) -> str:
    """How far the outputs are from the captured model's after a pass."""
    if "verify" not in record.notes:
        return "not verified"
    sqnr = record.notes["verify"]["from_captured"]["sqnr_db"]
    return "equal" if sqnr == float("inf") else f"{sqnr:.0f} dB"


def named(names: Sequence[str], every: bool) -> str:
    """The names, or the first of them and how many more."""
    if every or len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more"


def megabytes(size: float) -> str:
    """A size in bytes as MB, or kB where it is small."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def short(value: float, digits: int = 3) -> str:
    """A number with so many digits, or as many as its whole part has, and never an exponent above 1."""
    return f"{value:,.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"


def shortened(name: str, most: int = 24) -> str:
    """A name's end where it is longer than ``most`` letters: paths differ there."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def times(ratio: float) -> str:
    """A ratio as ``"2.4 times"``; two digits would make 1.04 of one."""
    return f"{short(ratio)} times"


def latency_cells(found: Percentiles, digits: int = 2) -> tuple[str, str, str]:
    """p50, p90 and p99 in ms; fewer than a hundred queries have no 99th percentile."""
    p50, p90, p99 = (f"{ns / 1e6:.{digits}f}" for ns in (found.p50_ns, found.p90_ns, found.p99_ns))
    return p50, p90, p99 if found.count >= P99_QUERIES else "–"


def milliseconds(seconds: float) -> str:
    """A time as ms with three digits."""
    return f"{short(seconds * 1e3)} ms"
