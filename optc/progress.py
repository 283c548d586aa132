"""Saying what is going on: a silent default, and the interface a terminal implements."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Step:
    """One long step in progress."""

    def update(self, text: str) -> None:
        """Say what the step is at, such as ``"calibrating 3/16"``."""

    def done(self, text: str) -> None:
        """Say what the step achieved; shown when it ends."""


class Progress:
    """Told of each step of a run. This one keeps silent."""

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Wrap a step; ``title`` says what is being done, such as ``"Capturing alexnet"``."""
        yield Step()

    def note(self, text: str) -> None:
        """A line that must not be missed."""


class Run:
    """Steps of one run: shown to the user and timed."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self._progress = progress

    def note(self, text: str) -> None:
        """Show a line at once and keep it for the report."""
        if text not in self.notes:
            self._progress.note(text)
            self.notes.append(text)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        start = time.perf_counter()
        try:
            with self._progress.step(title) as step:
                yield step
        finally:  # trials repeat steps, and one that fails took its time as well
            self.seconds[title] = self.seconds.get(title, 0.0) + time.perf_counter() - start
