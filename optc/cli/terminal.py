"""The terminal: progress on stderr with elapsed time, results on stdout, third-party noise only with ``-v``."""

from __future__ import annotations

import io
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from optc.cli.streams import ReaderLeft
from optc.progress import Progress, Step


def stdout() -> Console:
    """Standard output, for names and pip lines as they are: brackets in them are no markup, and letters that the
    terminal's encoding lacks are escaped.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return _Console(highlight=False, markup=False)


def stderr() -> Console:
    """Standard error, for progress. The work goes on if nobody reads that."""
    return _Unread(stderr=True, highlight=False, markup=False)


class _Unread(Console):
    def on_broken_pipe(self) -> None:
        self.quiet = True


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise ReaderLeft  # rich would end the process as if it had failed


def silence_third_parties() -> None:
    """Keep other packages' warnings and log lines from the user; ``-v`` does not call this.

    Logging is disabled as a whole, up to WARNING: torch sets up its loggers anew when it is imported, so their levels
    cannot be set beforehand, and optc itself tells the user nothing through logging.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


class _TerminalStep(Step):
    def __init__(self, title: str) -> None:
        self.title = title
        self.result = ""
        self._text = ""
        self._start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self._start

    def update(self, text: str) -> None:
        self._text = text

    def done(self, text: str) -> None:
        self.result = text

    def __rich__(self) -> Text:
        detail = f" · {self._text}" if self._text else ""
        return Text.assemble(f"{self.title}{detail} ", (f"{self.elapsed:.0f} s", "dim"))


class TerminalProgress(Progress):
    """A spinner with elapsed time while a step runs, one line when it has ended."""

    def __init__(self, console: Console, verbosity: int) -> None:
        self._console = console
        self._verbosity = verbosity

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        if self._verbosity < 0:
            yield Step()
            return
        step = _TerminalStep(title)
        with self._console.status(step, spinner="dots") if self._console.is_terminal else nullcontext():
            yield step
        result = f": {step.result}" if step.result else ""
        self._console.print(Text.assemble(("✓ ", "green"), f"{title}{result} ", (f"({step.elapsed:.1f} s)", "dim")))

    def note(self, text: str) -> None:
        self._console.print(Panel(Text(text, style="bold"), border_style="yellow", title="Note", title_align="left"))
