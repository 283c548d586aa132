"""Saying what is going on: a silent default, and the interface a terminal implements."""

from __future__ import annotations

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

    def note(self, text: str, *, important: bool = False) -> None:
        """A line worth reading; ``important`` ones must not be missed."""
