"""What each pass did to the size of the program."""

from __future__ import annotations

from collections import Counter

from optc.passmanager.contract import Instrument, Pass, PassRecord
from optc.program import Program


class Statistics(Instrument):
    """Counts operators and constant bytes before and after, rewrites by rule, and skips by rule."""

    name = "statistics"

    def after_pass(self, pass_: Pass, before: Program, after: Program, record: PassRecord) -> dict[str, object]:
        return {
            "operators": [before.operator_count(), after.operator_count()],
            "constant_bytes": [before.constant_bytes(), after.constant_bytes()],
            "applied": dict(Counter(change.rule for change in record.applied)),
            "skipped": dict(Counter(skip.rule for skip in record.skipped)),
        }
