"""Evaluation mode, also for what torch.export made: that is in it for good, and raises when asked for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def set_evaluation_mode(model: nn.Module) -> None:
    """Put a model and its submodules into evaluation mode."""
    with suppress(NotImplementedError):
        model.eval()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every submodule gets its own training flag back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    set_evaluation_mode(model)
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training
