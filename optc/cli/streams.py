"""Standard output kept for a command's result, whatever else is printed meanwhile, and by whom."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import IO


class ReaderLeft(Exception):
    """Whoever read standard output has seen enough. Not the OSError it comes of, with which click ends the process."""


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send to standard error what is printed: by Python, and by native code and child processes, which do not know of
    ``sys.stdout`` but write to the file descriptor.
    """
    with redirect_stdout(sys.stderr), _redirected(_descriptor(sys.__stdout__), _descriptor(sys.__stderr__)):
        yield


@contextmanager
def _redirected(source: int | None, target: int | None) -> Iterator[None]:
    """Let ``source`` write to where ``target`` does, or nowhere without one; do nothing where ``source`` is closed."""
    if source is None:
        yield
        return
    _flush()
    before = os.dup(source)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere if target is None else target, source)
        yield
    finally:
        _flush()
        os.dup2(before, source)
        os.close(before)
        os.close(nowhere)


def _descriptor(stream: IO[str] | None) -> int | None:
    """The file descriptor that the process was started with for a stream; ``None`` if it was closed."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError):
        return None


def _flush() -> None:
    """Write what Python's and C's buffers of standard output hold to where they belong until now."""
    with suppress(OSError, ValueError):
        if sys.__stdout__ is not None:
            sys.__stdout__.flush()
    ctypes.CDLL(None).fflush(None)
