"""The plugin: one backend, ``openvino``. Nothing is imported until it is used."""

from __future__ import annotations

from collections.abc import Iterable

from optc import Entry, hookimpl


@hookimpl
def optc_backends() -> Iterable[Entry]:
    """Called when anything is first looked up."""
    return [
        Entry(
            "openvino",
            "OpenVINO on CPU: an IR file (.xml and .bin).",
            "optc_openvino.backend:OpenVinoBackend",
            ("openvino",),
            "optc-openvino",
        )
    ]
