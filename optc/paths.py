"""Paths as users write them."""

from __future__ import annotations

from pathlib import Path


def encodable(text: str) -> str:
    r"""A text that can be written as UTF-8: bytes of a file's name that are none become ``\udcXX``."""
    return text.encode("utf-8", "backslashreplace").decode()


def user_path(text: str) -> Path:
    """A path with the home folder for a leading ``~``, or as it is where there is no such user or home."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)
