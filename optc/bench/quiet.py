"""Keeping the process itself from disturbing a measurement: other candidates' threads, the garbage collector."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

SETTLE_SECONDS = 0.25
"""Longest pause before a block: a runtime's workers spin for a while after a call (GNU's OpenMP about 10 ms, Intel's
200) and keep the cores from the next."""
_SLICE_SECONDS, _ASLEEP = 0.01, 0.05
"""How long the process is watched at a time, and how much of a core it uses at most when its workers sleep."""


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
    """Keep what is there already out of the collections around blocks: of PyTorch's objects alone each takes 0.2 s.

    A heap that the caller has frozen stays as it is: there is no way back to a part of it.
    """
    if gc.get_freeze_count():
        yield
        return
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
        while time.perf_counter() < deadline and _busy():
            pass
        yield
    finally:
        if enabled:
            gc.enable()


def _busy() -> bool:
    """Whether threads of this process run while this one sleeps."""
    start, used = time.perf_counter(), time.process_time()
    time.sleep(_SLICE_SECONDS)
    return time.process_time() - used > _ASLEEP * (time.perf_counter() - start)
