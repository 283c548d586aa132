"""Errors meant for people: one line that says what went wrong, where, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class OptcError(Exception):
    """Base of every error optc raises on purpose.

    Args:
        message: what went wrong and where, on one line.
        hint: how to mend it, on one line; appended after an em dash.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())
        super().__init__(f"{self.message} — {self.hint}" if self.hint else self.message)


class UnknownNameError(OptcError):
    """A name (model, pass, backend, dataset, option) that nothing registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
        suggestion = f"did you mean {', '.join(close)}?" if close else hint
        super().__init__(f"unknown {kind} '{name}'", suggestion)
        self.name = name
        self.close_matches = close


class PluginError(OptcError):
    """Something went wrong inside a plugin; the message names the plugin."""


class CaptureError(OptcError):
    """The model could not be captured as a graph."""


class WeightsError(OptcError):
    """A checkpoint could not be read or does not fit the model."""


class DataError(OptcError):
    """A dataset could not be read or does not fit the model."""


class PassContractError(OptcError):
    """A pass broke the contract; the message is addressed to the pass's author."""


class VerificationError(OptcError):
    """A pass moved the model's outputs beyond what it declared.

    Args:
        min_sqnr_db: what an approximate pass promised the outputs keep and they do not; ``None`` where anything else is
            wrong, such as an exact pass that is none.
        reproducer: the folder that was left to reproduce it, which ``hint`` names.
    """

    def __init__(
        self, message: str, hint: str = "", min_sqnr_db: float | None = None, reproducer: Path | None = None
    ) -> None:
        super().__init__(message, hint)
        self.min_sqnr_db = min_sqnr_db
        self.reproducer = reproducer


class BackendError(OptcError):
    """A backend cannot lower or load the model.

    Args:
        passing: whether it may go well another time, such as where memory ran out.
    """

    def __init__(self, message: str, hint: str = "", passing: bool = False) -> None:
        super().__init__(message, hint)
        self.passing = passing


class ArtifactError(OptcError):
    """An artifact folder cannot be written or read."""


class MeasurementError(OptcError):
    """A measurement could not be made or is not valid."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its type where it says nothing; all lines where that ends with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


def one_line(error: BaseException) -> str:
    """An error as a reason: its first line, with its type unless it was meant for people."""
    if isinstance(error, OptcError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
