"""Functions of PyTorch's own that have no option for what is needed here, replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, by: object) -> Iterator[None]:
    """In this context the attribute ``name`` of a module or class is ``by``; afterwards it is what it was."""
    original = vars(owner)[name]  # a class method itself, not bound to the class
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, original)
