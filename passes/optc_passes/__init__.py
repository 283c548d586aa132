"""The built-in passes: an ordinary optc plugin. Nothing is imported until a pass is used."""

from __future__ import annotations

from collections.abc import Iterable

from optc import Entry, hookimpl


@hookimpl
def optc_passes() -> Iterable[Entry]:
    return []
