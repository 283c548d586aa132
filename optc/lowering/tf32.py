"""float32 in the graph is float32 on a GPU, where PyTorch's own default for convolutions is TF32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ONE_AT_A_TIME = threading.Lock()
"""The setting is the process's: with calls that overlap the first to end would change it under the others."""


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Convolutions on a GPU compute in float32 meanwhile, not in TF32, which keeps 10 bits of 23; elsewhere they do."""
    if device.type != "cuda":
        yield
        return
    with _ONE_AT_A_TIME:
        before = torch.backends.cudnn.allow_tf32
        torch.backends.cudnn.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32 = before
