"""What a plugin can provide. Each hook says when it is called; all return entries, so nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pluggy

PROJECT = "optc"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Entry:
    """A named thing a plugin provides, imported only when it is used.

    Attributes:
        name: what users type.
        summary: one line, shown in listings without importing the target.
        target: ``"package.module:attribute"`` of the class.
        requires: import names the target needs beyond optc's own dependencies.
        install: what to ``pip install`` when one of them is missing.
    """

    name: str
    summary: str
    target: str
    requires: tuple[str, ...] = ()
    install: str = ""


@hookspec
def optc_passes() -> Iterable[Entry]:  # type: ignore[empty-body]
    """Provide passes; targets are subclasses of :class:`optc.Pass`. Called when anything is first looked up."""


@hookspec
def optc_backends() -> Iterable[Entry]:  # type: ignore[empty-body]
    """Provide backends; targets are subclasses of :class:`optc.Backend`. Called when anything is first looked up."""


@hookspec
def optc_model_sources() -> Iterable[Entry]:  # type: ignore[empty-body]
    """Provide model sources; targets are subclasses of :class:`optc.ModelSource`.

    Called when anything is first looked up.
    """


@hookspec
def optc_datasets() -> Iterable[Entry]:  # type: ignore[empty-body]
    """Provide datasets; targets are subclasses of :class:`optc.Dataset`. Called when anything is first looked up."""
