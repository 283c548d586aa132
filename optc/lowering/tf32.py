"""float32 in the graph is float32 on a GPU, where PyTorch's own default for convolutions is TF32."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_ONE_AT_A_TIME = threading.Lock()
"""The settings are the process's: with calls that overlap the first to end would change them under the others."""


@contextmanager
def without_tf32(device: torch.device) -> Iterator[None]:
    """Convolutions and products on a GPU compute in float32 meanwhile, not in TF32, which keeps 10 bits of 23.

    By the settings for each kind of operator: PyTorch's older flags cannot be read once somebody has used these.
    """
    if device.type != "cuda":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    settings: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    with _ONE_AT_A_TIME:
        changed = [each for each in settings if each.fp32_precision == "tf32"]
        try:
            for each in changed:
                each.fp32_precision = "ieee"
            yield
        finally:
            for each in changed:
                each.fp32_precision = "tf32"
