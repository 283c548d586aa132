"""Keeping the process itself from disturbing a measurement: other candidates' threads, the garbage collector."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SETTLE_SECONDS = 0.25
"""Pause before a block: torch's OpenMP workers spin for about 200 ms after a call and keep the cores from the next."""


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with ``count`` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Keep what is there already out of the collections around blocks: of PyTorch's objects alone each takes 0.2 s."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def quiet_machine() -> Iterator[None]:
    """Wait until the last candidate's workers sleep, and keep the garbage collector out of the measurement."""
    deadline = time.perf_counter() + SETTLE_SECONDS
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        time.sleep(max(0.0, deadline - time.perf_counter()))
        yield
    finally:
        if enabled:
            gc.enable()
