"""optc's own backends, model sources and datasets: an ordinary plugin that uses no private door."""

from __future__ import annotations

from collections.abc import Iterable

from optc.plugins.hookspecs import Entry, hookimpl


@hookimpl
def optc_backends() -> Iterable[Entry]:
    return []


@hookimpl
def optc_model_sources() -> Iterable[Entry]:
    return []


@hookimpl
def optc_datasets() -> Iterable[Entry]:
    return []
