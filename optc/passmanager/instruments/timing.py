"""Wall time of each pass."""

from __future__ import annotations

import time

from optc.passmanager.contract import Instrument, Pass, PassRecord
from optc.program import Program


class Timing(Instrument):
    """Times a pass with its contract checks. List it first, so that no other instrument is counted in."""

    name = "timing"

    def __init__(self) -> None:
        self._start = 0.0

    def before_pass(self, pass_: Pass, program: Program) -> None:
        self._start = time.perf_counter()

    def after_pass(self, pass_: Pass, before: Program, after: Program, record: PassRecord) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self._start}
