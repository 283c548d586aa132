"""What this plugin provides. Nothing is imported until a pass is used."""

from __future__ import annotations

from collections.abc import Iterable

from optc import Entry, hookimpl


@hookimpl
def optc_passes() -> Iterable[Entry]:
    """Called when anything is first looked up."""
    return [Entry("relu-once", "Drop a ReLU whose input is already a ReLU's output.", "optc_hello.relu_once:ReluOnce")]
