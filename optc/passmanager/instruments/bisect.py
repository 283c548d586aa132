"""Bisection over passes, as LLVM's ``-opt-bisect-limit``."""

from __future__ import annotations

from collections.abc import Callable

from optc.passmanager.contract import Instrument, Pass
from optc.program import Program


class Bisect(Instrument):
    """Runs only the first ``limit`` leaf passes and numbers each, so halving the limit finds the one that matters.

    Args:
        limit: how many leaf passes may run.
        write: called with one line per pass.
    """

    name = "bisect"

    def __init__(self, limit: int, write: Callable[[str], None]) -> None:
        self._limit = limit
        self._write = write
        self._count = 0

    def should_run(self, pass_: Pass, program: Program) -> bool:
        self._count += 1
        run = self._count <= self._limit
        self._write(f"BISECT: {'running' if run else 'NOT running'} pass ({self._count}) {pass_.name}")
        return run
