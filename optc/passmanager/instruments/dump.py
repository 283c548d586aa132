"""Printing the graph after passes, as LLVM's ``-print-after``."""

from __future__ import annotations

from collections.abc import Callable, Collection

from optc.passmanager.contract import Instrument, Pass, PassRecord
from optc.program import Program


class PrintAfter(Instrument):
    """Prints the graph after each of the named passes.

    Args:
        passes: names of leaf passes, or ``{"all"}``.
        write: called with the whole text.
    """

    name = "print-after"

    def __init__(self, passes: Collection[str], write: Callable[[str], None]) -> None:
        self._passes = passes
        self._write = write

    def after_pass(self, pass_: Pass, before: Program, after: Program, record: PassRecord) -> None:
        if "all" in self._passes or pass_.name in self._passes:
            self._write(f"# graph after {pass_.name} ({after.operator_count()} operators)\n{after.text()}")
