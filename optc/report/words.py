"""Facts of a report in the words that every form of it uses."""

from __future__ import annotations

from collections.abc import Sequence

from optc.passmanager.contract import PassRecord


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


def times(ratio: float) -> str:
    """A ratio as ``"2.4 times"``, with two digits, or as many as its whole part has."""
    return f"{ratio:.2g} times" if ratio < 10 else f"{ratio:,.0f} times"


def milliseconds(seconds: float) -> str:
    """A time as ms with three digits."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds * 1e3:,.0f} ms"
